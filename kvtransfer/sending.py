"""The sender's ticket as a state machine: pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kv import KvLayout, Span


@dataclass(frozen=True, slots=True)
class Credit:
    """The right to write one span once: its bytes go to `[offset, offset + length)` of the slab."""

    sequence: int
    span: Span
    offset: int
    length: int


@dataclass(slots=True)
class OutboundTicket:
    """One prompt being sent, from Open to Quiesced.

    Every credit is in exactly one state: waiting, gathering, writing (posted or under way), sent, or dropped. Quiesced
    may be said only when none is writing; what is still gathered then is never written.
    """

    ticket_id: str
    attempt: int
    end: int
    """Tokens of the prompt."""
    computed: int = 0
    started: bool = False
    """The source reported progress."""
    waiting: dict[int, Credit] = field(default_factory=dict)
    gathering: dict[int, Credit] = field(default_factory=dict)
    writing: dict[int, Credit] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    final: int | None = None
    """Sequence number of the credit that ends at the prompt's end."""
    cancelled: bool = False
    error: str = ""

    def grant(self, credit: Credit, layout: KvLayout, slab_bytes: int, max_bytes: int) -> None:
        """Takes a credit. Raises ValueError naming what is wrong with it."""
        span, seen = credit.span, len(self._all)
        if credit.sequence != seen:
            raise ValueError(f"grant has sequence {credit.sequence}; {seen} is expected")
        if span.start < 0 or span.count < 1 or span.end > self.end:
            raise ValueError(f"grant covers tokens {span.start}..{span.end}; the prompt has {self.end}")
        if credit.length != (expected := layout.span_bytes(span, self.end)):
            raise ValueError(f"grant has {credit.length} bytes; its {span.count} tokens have {expected}")
        if expected == 0:
            raise ValueError(f"grant covers tokens {span.start}..{span.end}; nothing of them is moved")
        if credit.length > max_bytes:
            raise ValueError(f"grant has {credit.length} bytes; at most {max_bytes} can be staged")
        if credit.offset + credit.length > slab_bytes:
            raise ValueError(f"grant ends at byte {credit.offset + credit.length}; the slab has {slab_bytes}")
        if self.final is not None:
            raise ValueError("grant comes after the prompt's last span")
        self.waiting[credit.sequence] = credit
        if span.end == self.end:
            self.final = credit.sequence

    def progressed(self, computed: int) -> bool:
        """Tokens up to here can be exported; whether that is news."""
        self.started = self.started or computed > 0
        if computed <= self.computed:
            return False
        self.computed = min(computed, self.end)
        return True

    def take_sendable(self) -> list[Credit]:
        """Moves the credits whose tokens are computed to `gathering` and returns them."""
        if self.stopping:
            return []
        ready = [credit for credit in self.waiting.values() if credit.span.end <= self.computed]
        for credit in ready:
            self.gathering[credit.sequence] = self.waiting.pop(credit.sequence)
        return ready

    def begin(self, sequence: int) -> bool:
        """A gathered span is to be written; whether it may: a ticket that stops may have quiesced."""
        if not self.stopping:
            self.writing[sequence] = self.gathering.pop(sequence)
        return not self.stopping

    def finished(self, sequence: int, complete: bool) -> None:
        """A write is terminal: complete at the receiver, or never started."""
        self.gathering.pop(sequence, None)
        self.writing.pop(sequence, None)
        (self.sent if complete else self.dropped).add(sequence)

    def fail(self, error: str) -> None:
        """Ends the ticket with an error; the first one counts."""
        self.error = self.error or error

    @property
    def stopping(self) -> bool:
        """Whether no further write may start."""
        return self.cancelled or bool(self.error)

    @property
    def over(self) -> bool:
        """Whether nothing of the ticket is or will be under way, so that it may quiesce."""
        if self.writing:
            return False
        return self.stopping or (self.final is not None and len(self.sent) == self.final + 1)

    def check_integrity(self) -> None:
        """Raises AssertionError when a credit is in no or in two states."""
        assert sorted(self._all) == list(range(len(self._all))), f"credits in states: {self._all}"
        begun = [*self.gathering.values(), *self.writing.values()]
        assert all(credit.span.end <= self.computed for credit in begun)

    @property
    def _all(self) -> list[int]:
        return [*self.waiting, *self.gathering, *self.writing, *self.sent, *self.dropped]
