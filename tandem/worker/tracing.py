"""A worker's part of requests' traces: the steps that computed their prompts, and the hand-overs that it sends.

Times are those of the engine's steps and of the event loop, all of the monotonic clock; see docs/tracing.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.cluster import TicketWatch
from tandem.engine.output import StepOutput
from tandem.tracing.otel import Carried, Span, SpanKind, Tracer

MAX_CHUNKS = 64
"""Steps remembered of one prompt; the last one stands for all that follow."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step that computed a part of a prompt. Times in seconds, monotonic."""

    began: float
    ended: float
    computed: int
    """Tokens of the prompt that had KV afterwards."""


class StepLog:
    """The steps of traced sequences, from `follow` to `take`."""

    def __init__(self) -> None:
        self._open: dict[str, list[Chunk]] = {}

    def follow(self, seq_id: str) -> None:
        """Remembers this sequence's steps from now on."""
        self._open[seq_id] = []

    def on_step(self, output: StepOutput) -> None:
        """A step has ended."""
        if not self._open:
            return
        for progress in output.progress:
            chunks = self._open.get(progress.seq.seq_id)
            if chunks is None:
                continue
            began = output.began
            if len(chunks) >= MAX_CHUNKS:
                began = chunks.pop().began
            chunks.append(Chunk(began, output.ended, progress.computed))

    def take(self, seq_id: str) -> list[Chunk]:
        """The sequence's steps, which are forgotten."""
        return self._open.pop(seq_id, [])

    def __len__(self) -> int:
        """Sequences that are followed."""
        return len(self._open)


class WorkerTraces:
    """What one worker traces with. All methods but `close` run on the event loop."""

    def __init__(self, tracer: Tracer, role: str, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: that of steps and of the event loop."""
        self.tracer = tracer
        self.clock = clock
        self.steps = StepLog()
        self._role = role

    def watch(self, ticket_id: str, traceparent: str, tracestate: str) -> TicketSpans:
        """A ticket of a traced request was opened here; see `kvtransfer.base.Hooks`."""
        self.steps.follow(ticket_id)
        return TicketSpans(self, f"{self._role} worker", ticket_id, (traceparent, tracestate))

    def close(self) -> None:
        """Sends what there is, for two seconds at most. Blocks."""
        self.tracer.close()


class TicketSpans(TicketWatch):
    """The spans of one hand-over at its sender."""

    def __init__(self, traces: WorkerTraces, name: str, ticket_id: str, parent: Carried) -> None:
        self._traces = traces
        self._ticket_id = ticket_id
        self._clock = traces.clock
        self._opened = self._clock()
        self._span = traces.tracer.begin(name, self._opened, parent, kind=SpanKind.SERVER)
        self._accepted: float | None = None
        self._cached: int | None = None
        self._first_write: float | None = None
        self._last_write = 0.0
        self._writing_s = 0.0
        self._bytes = 0
        self._spans = 0

    def accepted(self, cached: int) -> None:
        """See `TicketWatch`."""
        self._accepted, self._cached = self._clock(), cached

    def wrote(self, seconds: float, length: int) -> None:
        """See `TicketWatch`."""
        self._last_write = self._clock()
        if self._first_write is None:
            self._first_write = self._last_write - seconds
        self._writing_s += seconds
        self._bytes += length
        self._spans += 1

    def ended(self, error: str) -> None:
        """See `TicketWatch`."""
        tracer, span, now = self._traces.tracer, self._span, self._clock()
        chunks = self._traces.steps.take(self._ticket_id)
        turn = chunks[0].began if chunks else self._accepted
        tracer.add("queue", (self._opened, now if turn is None else turn), span)
        if chunks:
            add_prefill(tracer, "prefill", chunks, span)
        if self._first_write is not None:
            moved = {"tandem.moved_bytes": self._bytes, "tandem.kv_spans": self._spans}
            times = self._first_write, self._last_write
            tracer.add("transfer", times, span, moved | {"tandem.writing_ms": self._writing_s * 1000})
        tracer.end(span, now, {"tandem.cached_tokens": self._cached}, failure=error or None)


def add_prefill(tracer: Tracer, name: str, chunks: Sequence[Chunk], parent: Span) -> None:
    """The span of a prompt's computing, with one below it for each step."""
    times = chunks[0].began, chunks[-1].ended
    whole = tracer.add(name, times, parent, {"tandem.chunks": len(chunks)})
    for chunk in chunks:
        tracer.add("chunk", (chunk.began, chunk.ended), whole, {"tandem.computed_tokens": chunk.computed})
