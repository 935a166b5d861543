"""A small OTLP/HTTP receiver of traces, for tests: keeps what comes as plain spans."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

WAIT_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it came. Times are Unix seconds."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    began: float
    ended: float
    attributes: dict[str, Any]
    events: tuple[tuple[str, float, dict[str, Any]], ...]
    """(name, when, attributes)"""
    failed: bool
    failure: str
    state: str
    """Its `tracestate`."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass
class Collector:
    """What came so far; `port` is on loopback."""

    port: int = 0
    spans: list[ReceivedSpan] = field(default_factory=list)
    requests: int = 0
    refused: int = 0
    status: int = 200
    """What is answered."""
    arrived: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        """What processes are given as `otlp_endpoint`."""
        return f"http://127.0.0.1:{self.port}"

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of one trace, by their beginning."""
        with self.arrived:
            mine = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(mine, key=lambda span: span.began)

    def wait(self, enough: Callable[[Sequence[ReceivedSpan]], bool], within_s: float = WAIT_S) -> list[ReceivedSpan]:
        """All spans, once they are enough. Raises AssertionError when that does not come."""
        with self.arrived:
            came = self.arrived.wait_for(lambda: enough(self.spans), within_s)
            names = [(span.service, span.name) for span in self.spans]
            assert came, f"not enough spans came: {names}"
            return list(self.spans)

    def take(self, body: bytes) -> None:
        """A request's body has come."""
        message = ExportTraceServiceRequest.FromString(body)
        with self.arrived:
            self.requests += 1
            for group in message.resource_spans:
                about = _values(group.resource.attributes)
                for scope in group.scope_spans:
                    self.spans += [_received(about, span) for span in scope.spans]
            self.arrived.notify_all()


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _received(about: dict[str, Any], span: WireSpan) -> ReceivedSpan:
    return ReceivedSpan(
        service=about.get("service.name", ""),
        instance=about.get("service.instance.id", ""),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=int(span.kind),
        began=span.start_time_unix_nano / 1e9,
        ended=span.end_time_unix_nano / 1e9,
        attributes=_values(span.attributes),
        events=tuple((each.name, each.time_unix_nano / 1e9, _values(each.attributes)) for each in span.events),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        failure=span.status.message,
        state=span.trace_state,
    )


@contextlib.contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """Receives traces on a port of loopback; 0 takes a free one."""
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            known = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            status = made.status if known else 404
            if status == 200:
                made.take(body)
            made.refused += status != 200
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    made.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_S}, name="otlp receiver")
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_text(spans: Sequence[ReceivedSpan]) -> str:
    """One trace as an indented list: offset and length in milliseconds, process, name."""
    known = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in known]
    start = min(span.began for span in spans)
    lines: list[str] = []

    def add(span: ReceivedSpan, depth: int) -> None:
        name = "  " * depth + span.name + (f"  ! {span.failure}" if span.failed else "")
        at, length = (span.began - start) * 1000, span.seconds * 1000
        lines.append(f"{at:9.1f} {length:9.1f}  {span.service.removeprefix('tandem-'):8} {name}")
        children = [child for child in spans if child.parent_id == span.span_id]
        for child in sorted(children, key=lambda each: each.began):
            add(child, depth + 1)

    for root in sorted(roots, key=lambda each: each.began):
        add(root, 0)
    return "\n".join(["  at (ms)  took (ms)  process  span", *lines])


def union_s(spans: Sequence[ReceivedSpan], begin: float, end: float) -> float:
    """Seconds of [begin, end] that some of the spans cover, overlaps counted once."""
    covered, reached = 0.0, begin
    for span in sorted(spans, key=lambda each: each.began):
        first, last = max(span.began, reached), min(span.ended, end)
        if last > first:
            covered += last - first
            reached = last
    return covered


def leaves(spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    """The spans without others below them."""
    parents = {span.parent_id for span in spans}
    return [span for span in spans if span.span_id not in parents]
