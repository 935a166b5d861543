"""Spans with explicit times, batched and sent by OpenTelemetry's SDK in a thread of its own.

Nothing here measures: whoever has the times of a request, seconds of the monotonic clock, makes its spans once it has
ended. The mapping to wall-clock time is fixed when a process starts, so that its spans never overlap by a clock's step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem import __version__

__all__ = ["Carried", "Event", "Span", "SpanKind", "Tracer"]

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
CLOSE_S = 2.0
"""What a process that ends waits for its last spans to be taken."""
MAX_TRACESTATE = 512
"""Characters of a client's `tracestate` that are passed on; a longer one is dropped."""
CLOCK_LOOKS = 5

Value: TypeAlias = str | int | float | bool | Sequence[str]
Attributes: TypeAlias = Mapping[str, Value | None]
"""Those that are None are left out."""
Carried: TypeAlias = tuple[str, str]
"""`traceparent` and `tracestate`: how a context travels (W3C Trace Context)."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened within a span. at: seconds, monotonic."""

    name: str
    at: float
    attributes: Attributes = field(default_factory=dict)


class Tracer:
    """One process's spans. All times are seconds of the monotonic clock.

    Who has no parent is sampled by `share`, everyone else as its parent was. At most 2,048 ended spans wait to be sent
    (OTEL_BSP_MAX_QUEUE_SIZE); while nobody takes them the oldest are dropped.
    """

    def __init__(self, endpoint: str, share: float, service: str, instance: str, prompts: bool = False) -> None:
        """endpoint: base of the collector's URL. service: of the process's role. prompts: whether spans carry them."""
        self.prompts = prompts
        self._offset_ns = _wall_offset_ns()
        self._exporter = _OnceLogged(endpoint)
        self._processor = BatchSpanProcessor(self._exporter)
        names = {"service.name": service, "service.namespace": "tandem", "service.instance.id": instance}
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource.create({**names, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("tandem", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self,
        name: str,
        at: float,
        parent: Span | Carried | None = None,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        """A span that `end` must be called with. Without a parent it begins a trace."""
        return self._tracer.start_span(name, self._context(parent), kind, _said(attributes), start_time=self._ns(at))

    def end(
        self,
        span: Span,
        at: float,
        attributes: Attributes | None = None,
        events: Sequence[Event] = (),
        failure: str | None = None,
    ) -> None:
        """Ends a span. failure: why what it stands for failed; None when it did not."""
        span.set_attributes(_said(attributes))
        for event in events:
            span.add_event(event.name, _said(event.attributes), self._ns(event.at))
        if failure is not None:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(self._ns(at))

    def add(
        self,
        name: str,
        times: tuple[float, float],
        parent: Span,
        attributes: Attributes | None = None,
        events: Sequence[Event] = (),
        failure: str | None = None,
    ) -> Span:
        """A span that is over. times: its start and end."""
        start, end = times
        span = self.begin(name, start, parent, attributes)
        self.end(span, max(start, end), None, events, failure)
        return span

    def carried(self, span: Span) -> Carried:
        """What tells another process of a span; empty where the trace is not sampled."""
        if not span.is_recording():
            return "", ""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span))
        return carrier.get("traceparent", ""), carrier.get("tracestate", "")

    def _context(self, parent: Span | Carried | None) -> Context:
        if isinstance(parent, Span):
            return trace.set_span_in_context(parent, Context())
        carrier = {}
        if parent is not None and parent[0]:
            carrier["traceparent"] = parent[0]
            if 0 < len(parent[1]) <= MAX_TRACESTATE:
                carrier["tracestate"] = parent[1]
        return self._propagator.extract(carrier, Context())

    def _ns(self, at: float) -> int:
        return round(at * 1e9) + self._offset_ns

    def close(self) -> None:
        """Sends what there is, for about two seconds at most. Blocks."""
        self._exporter.closing = True
        sending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(CLOSE_S)
        self._exporter.abandon()
        sending.join(CLOSE_S)


def trace_id(span: Span) -> str:
    """As 32 hexadecimal digits; empty where the trace is not sampled."""
    return format(span.get_span_context().trace_id, "032x") if span.is_recording() else ""


class _OnceLogged(SpanExporter):
    """The SDK's exporter. That a collector does not answer is logged once, and once more when it does again."""

    def __init__(self, endpoint: str) -> None:
        base = endpoint.rstrip("/")
        self._url = base if base.endswith(TRACES_PATH) else base + TRACES_PATH
        self._inner = OTLPSpanExporter(self._url)
        self._failing = False
        self._ended = False
        self.closing = False
        """Whether a collector that does not answer gets no more chances."""
        logging.getLogger("urllib3").setLevel(logging.INFO)
        for part in ("opentelemetry.exporter", "opentelemetry.sdk"):
            logging.getLogger(part).setLevel(logging.CRITICAL)  # they would log each batch, and each span dropped

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch; a failure is retried for 10 seconds (OTEL_EXPORTER_OTLP_TIMEOUT)."""
        if self._ended or (self.closing and self._failing):
            return SpanExportResult.FAILURE
        result = self._inner.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            log.warning("traces do not reach %s and are dropped; this is said once until they do", self._url)
        elif self._failing and not failed:
            log.info("traces reach %s again", self._url)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self.abandon()

    def abandon(self) -> None:
        """Ends a batch that is being retried, too; idempotent."""
        if not self._ended:
            self._ended = True
            self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Holds nothing back."""
        return True


def _wall_offset_ns() -> int:
    """Wall-clock time less monotonic time: the look at both clocks that was disturbed least."""
    looks = []
    for _ in range(CLOCK_LOOKS):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        looks.append((after - before, wall - (before + after) // 2))
    return min(looks)[1]


def _said(attributes: Attributes | None) -> dict[str, Value]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
