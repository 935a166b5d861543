"""The receiver's ticket as a state machine: pure, with the time as an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvtransfer.layout import cut
from kvtransfer.slab import Range
from tandem.kv import Span


@dataclass(slots=True)
class InboundTicket:
    """One fetch, from Open to Quiesced. Sequence n is the n-th of the planned spans.

    Every planned span is in exactly one state: not granted, granted (`out`), arrived (`copied`) or landed. A range of the
    slab belongs to the ticket from its grant until the span has landed, or until the peer has quiesced.
    """

    ticket_id: str
    attempt: int
    end: int
    """Tokens of the prompt."""
    queue_s: float
    transfer_s: float
    opened_at: float
    first: int = 0
    """First token wanted, once planned."""
    spans: tuple[Span, ...] = ()
    span_tokens: int = 1
    next_sequence: int = 0
    out: dict[int, Range] = field(default_factory=dict)
    copied: dict[int, Range] = field(default_factory=dict)
    landed: set[int] = field(default_factory=set)
    computed: int = 0
    cached: int = 0
    started: bool = False
    """The sender reported progress, or a span arrived."""
    moving_since: float = 0.0
    """Last progress while grants were out."""
    granted_at: float | None = None
    sent: int | None = None
    """Spans the sender says it sent, once it has quiesced."""
    kind: str = ""
    error: str = ""
    ended: bool = False
    """The fetch has its result; only Quiesced is awaited."""

    def plan(self, first: int, span_tokens: int) -> None:
        """Decides the spans, now that the first token wanted is known. Raises ValueError for a second plan."""
        if self.spans or not 0 <= first <= self.end:
            raise ValueError(f"cannot plan from token {first} of {self.end}")
        self.first, self.span_tokens = first, span_tokens
        self.spans = tuple(cut(first, self.end, span_tokens))

    def next_span(self, ahead: int) -> Span | None:
        """The next span to grant, unless it is more than `ahead` spans beyond what the sender has computed."""
        if self.ended or self.error or self.sent is not None or self.next_sequence == len(self.spans):
            return None
        span = self.spans[self.next_sequence]
        return span if span.start < max(self.computed, self.first) + ahead * self.span_tokens else None

    def granted(self, taken: Range, now: float) -> int:
        """The next span was granted with this range; returns its sequence number."""
        sequence = self.next_sequence
        if not self.out:
            self.moving_since = now
        if self.granted_at is None:
            self.granted_at = now
        self.out[sequence] = taken
        self.next_sequence += 1
        return sequence

    def progressed(self, computed: int, now: float) -> None:
        """The sender computed up to here."""
        self.started = self.started or computed > 0
        self.computed = max(self.computed, computed)
        self.moving_since = now

    def arrived(self, sequence: int, now: float) -> None:
        """The span's bytes were copied and verified."""
        self.copied[sequence] = self.out.pop(sequence)
        self.started, self.moving_since = True, now

    def landing_done(self, sequence: int) -> Range:
        """The sink has the span; returns the range, which is free again."""
        taken = self.copied.pop(sequence)
        self.landed.add(sequence)
        return taken

    def fail(self, kind: str, error: str) -> None:
        """Ends the fetch with an error; the first one counts."""
        if not self.error:
            self.kind, self.error = kind, error

    def quiesced(self, sent: int, error: str) -> list[Range]:
        """The sender is done for good; returns the ranges that this frees now: all that the fetch does not wait for."""
        self.sent = sent
        if not self.ended:
            if error:
                self.fail("sender", error)
            elif sent < len(self.spans) or not self.spans:
                self.fail("sender", f"the sender ended after {sent} of {len(self.spans)} spans")
        return self.drain() if self.ended else []

    def drain(self) -> list[Range]:
        """Takes all ranges from a ticket that nobody writes for any more."""
        ranges = [*self.out.values(), *self.copied.values()]
        self.out.clear()
        self.copied.clear()
        return ranges

    @property
    def complete(self) -> bool:
        """Whether every planned span has landed."""
        return len(self.landed) == len(self.spans)

    @property
    def needs_cancel(self) -> bool:
        """Whether the sender must be told to stop: it ends by itself only after the last span."""
        return self.sent is None and (not self.complete or not self.spans)

    @property
    def over(self) -> bool:
        """Whether nothing of the ticket is left."""
        return self.ended and self.sent is not None

    @property
    def landed_until(self) -> int:
        """Tokens up to which everything wanted has landed."""
        for sequence, span in enumerate(self.spans):
            if sequence not in self.landed:
                return span.start
        return self.end if self.spans else self.first

    @property
    def landed_tokens(self) -> int:
        """Tokens of the spans that have landed."""
        return sum(self.spans[sequence].count for sequence in self.landed)

    def expired(self, now: float) -> tuple[str, str] | None:
        """The deadline that passed, as (kind, error). Queueing and moving have one each; waiting for slab space has none."""
        if self.error or self.ended:
            return None
        if not self.started:
            if now - self.opened_at > self.queue_s:
                return "queue_deadline", f"the sender did not start within queue_deadline_s = {self.queue_s:g}"
        elif self.out and now - self.moving_since > self.transfer_s:
            return "transfer_deadline", f"no progress for transfer_deadline_s = {self.transfer_s:g}"
        return None

    def check_integrity(self) -> None:
        """Raises AssertionError when a span is in no or in two states."""
        states = [*self.out, *self.copied, *self.landed]
        if not (self.ended and self.sent is not None):
            assert sorted(states) == list(range(self.next_sequence)), f"spans in states: {states}"
        assert self.next_sequence <= len(self.spans)
        assert len(set(states)) == len(states)
