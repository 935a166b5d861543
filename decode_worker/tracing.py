"""The decode worker's spans of one attempt of a request: made when it ends, of the times that were noted on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.tracing.otel import Attributes, Carried, Event, Span, SpanKind
from tandem.types import FinishReason, GenerateRequest
from tandem.worker.tracing import Chunk, WorkerTraces, add_prefill

if TYPE_CHECKING:
    from decode_worker.prefill_client import Outcome
    from decode_worker.requests import Request

FAILED = (FinishReason.ERROR, FinishReason.CANCELLED)


class RequestSpans:
    """One traced attempt, from its receipt. Times are seconds of the event loop."""

    def __init__(self, traces: WorkerTraces, request: GenerateRequest, lead: str, received: float) -> None:
        """lead: id of the sequence that the prompt is computed in."""
        self._traces = traces
        self._tracer = traces.tracer
        self._lead = lead
        self._received = received
        parent = request.traceparent, request.tracestate
        self._span = self._tracer.begin("decode worker", received, parent, kind=SpanKind.SERVER)
        self._prepared: float | None = None
        self._hand_over: Span | None = None
        self._landed: float | None = None
        self._whole = False
        """Whether the hand-over brought all that there was to bring."""
        traces.steps.follow(lead)

    def prepared(self, now: float) -> None:
        """It was admitted, and its prompt's turn begins: in the engine's queue, or with the hand-over."""
        self._prepared = now

    def hand_over(self, now: float) -> Carried:
        """A prefill worker is asked; what that worker's spans belong to."""
        self._hand_over = self._tracer.begin("hand-over", now, self._span, kind=SpanKind.CLIENT)
        return self._tracer.carried(self._hand_over)

    def landed(self, now: float, outcome: Outcome, moved_tokens: int) -> None:
        """The hand-over has ended, and what came of it is in the pages."""
        if self._hand_over is None:
            return
        said: Attributes = {
            "tandem.worker.prefill": outcome.sender,
            "tandem.moved_tokens": moved_tokens,
            "tandem.moved_bytes": outcome.bytes,
            "tandem.sender_cached_tokens": outcome.sender_cached,
            "tandem.senders_tried": outcome.tried,
        }
        events = [
            Event("failed", at, {"tandem.worker.prefill": sender, "tandem.reason": reason})
            for at, sender, reason in outcome.failures
        ]
        if outcome.arrived_at:
            self._tracer.add("landing", (outcome.arrived_at, now), self._hand_over)
        failure = None if outcome.complete else "nobody handed it over; the rest is computed here"
        self._tracer.end(self._hand_over, now, said, events, failure)
        self._hand_over, self._landed, self._whole = None, now, outcome.complete

    def ended(self, record: Request, now: float) -> None:
        """Every choice has ended."""
        chunks = self._traces.steps.take(self._lead)
        admission = self._received
        if record.request.sampling.grammar is not None:
            admission = record.admitted_at
            self._tracer.add("compile grammar", (self._received, admission), self._span)
        ready = now if self._prepared is None else self._prepared
        self._tracer.add("admission", (admission, ready), self._span)
        if self._hand_over is not None:
            self._tracer.end(self._hand_over, now, failure="the request ended before it")
        elif self._prepared is not None:
            self._computed(record, chunks, ready if self._landed is None else self._landed, now)
        ends = [choice.finish for choice in record.choices if choice.finish is not None]
        failure = None
        if any(end in FAILED for end in ends):
            failure = next((choice.error for choice in record.choices if choice.error), "cancelled")
        request = record.request
        said: Attributes = {
            "tandem.request_id": request.request_id,
            "tandem.attempt": request.attempt,
            "gen_ai.response.finish_reasons": [end.value for end in ends],
            "gen_ai.usage.input_tokens": len(request.prompt),
            "gen_ai.usage.output_tokens": sum(len(choice.tokens) - choice.resumed for choice in record.choices),
            "tandem.resumed_tokens": sum(choice.resumed for choice in record.choices) or None,
            "tandem.cached_tokens": record.cached_tokens,
            "tandem.decode_cached_tokens": record.decode_cached,
            "tandem.retractions": record.lead.seq.retractions or None,
        }
        self._tracer.end(self._span, now, said, failure=failure)

    def _computed(self, record: Request, chunks: list[Chunk], ready: float, now: float) -> None:
        """From the engine's queue to the last token."""
        turn = chunks[0].began if chunks else now
        # The engine may have begun with it before the event loop heard that it can.
        self._tracer.add("waiting", (min(ready, turn), turn), self._span)
        if not chunks:
            return
        # After a whole hand-over one token is left to compute: that step is the first token's.
        local = not self._whole or len(chunks) > 1
        if local:
            add_prefill(self._tracer, "local prefill", chunks, self._span)
        first = record.first_token_at
        if first is None:
            return
        self._tracer.add("first token", (chunks[-1].ended if local else turn, first), self._span)
        self._tracer.add("decode", (first, now), self._span)
