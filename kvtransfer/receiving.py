"""The receiver's ticket as a state machine: pure, with the time as an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtransfer.layout import cut
from kvtransfer.slab import Range
from tandem.kv import Span


@dataclass(slots=True)
class InboundTicket:
    """One fetch, from Open to Quiesced. Sequence n is the n-th of the planned spans.

    Every planned span is in exactly one state: not granted, granted (`out`), arrived (`copied`) or landed. A range of
    the slab belongs to the ticket from its grant until the span has landed, or until the peer has quiesced.
    """

    ticket_id: str
    attempt: int
    end: int
    """Tokens of the prompt."""
    queue_s: float
    transfer_s: float
    opened_at: float
    first: int = 0
    """First token wanted."""
    spans: tuple[Span, ...] | None = None
    """None until it is known which are wanted."""
    granted: int = 0
    """Spans granted so far: the next sequence number."""
    out: dict[int, Range] = field(default_factory=dict)
    copied: dict[int, Range] = field(default_factory=dict)
    landed: set[int] = field(default_factory=set)
    computed: int = 0
    cached: int = 0
    started: bool = False
    """The sender reported progress, or a span arrived."""
    progress_at: float = 0.0
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
        if self.spans is not None or not 0 <= first <= self.end:
            raise ValueError(f"cannot plan from token {first} of {self.end}")
        self.first, self.spans = first, tuple(cut(first, self.end, span_tokens))

    def next_span(self, ahead: int) -> Span | None:
        """The next span to grant, unless `ahead` granted spans already wait for the sender to compute them."""
        if self.spans is None or self.granted == len(self.spans) or self.ended or self.error or self.sent is not None:
            return None
        span = self.spans[self.granted]
        return span if self.ahead < ahead or span.end <= self.computed else None

    @property
    def ahead(self) -> int:
        """Granted spans that wait for the sender to compute them."""
        return sum(self._span(sequence).end > self.computed for sequence in self.out)

    def grant(self, taken: Range, now: float) -> int:
        """The next span was granted with this range; returns its sequence number."""
        if not self.out:
            self.progress_at = now
        if self.granted_at is None:
            self.granted_at = now
        self.out[self.granted] = taken
        self.granted += 1
        return self.granted - 1

    def progressed(self, computed: int, now: float) -> None:
        """The sender computed up to here."""
        self.started = self.started or computed > 0
        self.computed = max(self.computed, computed)
        self.progress_at = now

    def arrived(self, sequence: int, now: float) -> None:
        """The span's bytes were copied and verified."""
        self.copied[sequence] = self.out.pop(sequence)
        self.started, self.progress_at = True, now

    def land(self, sequence: int) -> Range:
        """The sink has the span; returns the range, which is free again."""
        taken = self.copied.pop(sequence)
        self.landed.add(sequence)
        return taken

    def fail(self, kind: str, error: str) -> bool:
        """Ends the fetch with an error; whether it is the first one, the one that counts."""
        if self.error or self.ended:
            return False
        self.kind, self.error = kind, error
        return True

    def quiesced(self, sent: int, error: str, link_failed: bool = False) -> bool:
        """The sender is done for good; whether that fails the fetch. link_failed: it could not write."""
        self.sent = sent
        wanted = len(self.spans or ())
        if error or self.spans is None or sent < wanted:
            kind = "link" if link_failed else "sender"
            return self.fail(kind, error or f"the sender ended after {sent} of {wanted} spans")
        return False

    def drain(self) -> list[Range]:
        """Takes all ranges from a ticket that nobody writes for any more."""
        ranges = [*self.out.values(), *self.copied.values()]
        self.out.clear()
        self.copied.clear()
        return ranges

    @property
    def complete(self) -> bool:
        """Whether every span wanted has landed."""
        return self.spans is not None and len(self.landed) == len(self.spans)

    @property
    def needs_cancel(self) -> bool:
        """Whether the sender must be told to stop: by itself it ends only after the prompt's last span."""
        return self.sent is None and not (self.spans and self.complete)

    @property
    def landed_until(self) -> int:
        """Token up to which everything wanted has landed."""
        gap = next((span.start for number, span in enumerate(self.spans or ()) if number not in self.landed), None)
        return gap if gap is not None else self.end if self.spans else self.first

    @property
    def landed_spans(self) -> list[Span]:
        """The spans that have landed."""
        return [span for number, span in enumerate(self.spans or ()) if number in self.landed]

    def expired(self, now: float) -> tuple[str, str] | None:
        """The deadline that passed, as (kind, error).

        Queueing and moving have one each. A span beyond what is computed, granted or not, waits for the sender's turn
        to compute, even if cached spans before it have moved: that is queueing. Waiting for space has none; a sender
        that is gone is the lease's matter.
        """
        if not self.started and now - self.opened_at > self.queue_s:
            return "queue_deadline", f"the sender did not start within queue_deadline_s = {self.queue_s:g}"
        if not self.started or self.spans is None:
            return None
        idle = now - self.progress_at
        if self.ahead < len(self.out):
            if idle > self.transfer_s:
                return "transfer_deadline", f"no progress for transfer_deadline_s = {self.transfer_s:g}"
        elif idle > self.queue_s and (self.ahead or self._next_is_not_computed):
            return "queue_deadline", f"the sender computed nothing for queue_deadline_s = {self.queue_s:g}"
        return None

    @property
    def _next_is_not_computed(self) -> bool:
        return self.spans is not None and any(span.end > self.computed for span in self.spans[self.granted :][:1])

    def _span(self, sequence: int) -> Span:
        assert self.spans is not None
        return self.spans[sequence]

    def check_integrity(self) -> None:
        """Raises AssertionError when a span is in no or in two states."""
        states = sorted([*self.out, *self.copied, *self.landed])
        assert self.granted <= len(self.spans or ())
        assert states == list(range(self.granted)) or (self.ended and self.sent is not None), f"spans: {states}"
