"""A worker's Prometheus page."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem import __version__
from tandem.cluster import MoveStat, WorkerInfo
from tandem.engine.output import DraftOutcome
from tandem.trust import same_secret
from tandem.types import FinishReason

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

CONNECTIONS = 32
"""At once, each with a thread. One more is closed."""
CONNECTION_S = 10.0
"""From a connection's start to its end: who says nothing, or little, or reads nothing, does not keep a thread."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

FAILURE_KINDS = (
    "bad_grant",
    "digest",
    "duplicate",
    "duplicate_ticket",
    "foreign",
    "hand_over",
    "link",
    "pair",
    "queue_deadline",
    "quiesce_deadline",
    "sender",
    "sink",
    "transfer_deadline",
    "transport",
)
"""Of `tandem_worker_failures_total`: see docs/runbooks/TandemKvHandoverFailures.md."""

ALIAS_PATH = "/metrics/vllm"

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)


class WorkerMetrics:
    """All series of one worker, in a registry of its own. Base units; counters end in `_total`."""

    def __init__(self, moves: Callable[[], Iterable[MoveStat]]) -> None:
        self.registry = CollectorRegistry()
        self._make_latencies()
        self._make_load()
        counter = self._counter
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens admitted")
        self.prefix_hits = counter(
            "prefix_hit_tokens",
            "Prompt tokens found cached, by place: this worker's cache, or a prefill worker's",
            "place",
        )
        self.retractions = counter("retractions", "Sequences put back for want of pages")
        self.checked_pages = counter("kv_checked_pages", "Cached KV pages compared with their digest")
        self.corrupt_pages = counter("kv_corrupt_pages", "Cached KV pages that had changed, and were dropped")
        self._compared = (0, 0)
        self.forced_tokens = counter("forced_tokens", "Output tokens that a grammar left no choice for")
        self.drafts = DraftMetrics(self.registry)
        self.requests = counter("requests", "Requests ended, by outcome", "outcome")
        self.failures = counter("failures", "Failures by kind", "kind")
        self.lease_expiries = counter("lease_expiries", "Others silent for a whole lease: peer, router", "of")
        self.probes = counter("probes", "Pages sent to itself over its transport, by outcome", "outcome")
        self.registry.register(MoveCollector(moves))
        ProcessCollector(registry=self.registry)
        self._start_at_nought()
        self.ready: Callable[[], bool] = lambda: False
        """Whether the worker takes requests: what `/ready` says, on a thread of its own."""
        self._gauge("ready", "1 while it takes requests").set_function(lambda: float(self.ready()))
        self.alias: Callable[[], bytes] | None = None
        """The page under vLLM's names, where it is wanted."""
        self._page: WSGIServer | None = None
        self._host = ""

    def _make_latencies(self) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tandem_worker_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        self.ttft = histogram("time_to_first_token", "Admission here to the first token")
        self.inter_token = histogram("inter_token", "Between two tokens of a choice")
        self.end_to_end = histogram("request", "Admission here to the end")
        self.step = histogram("step", "One engine step")

    def _make_load(self) -> None:
        self.step_tokens = self._counter("step_tokens", "Tokens computed")
        self.running = self._gauge("running", "Sequences in the batch")
        self.waiting = self._gauge("waiting", "Sequences not yet in the batch")
        self.queued_tokens = self._gauge("queued_tokens", "Prompt tokens still to be computed here")
        self.oldest = self._gauge("oldest_waiting_seconds", "How long the oldest waiting sequence has waited")
        self.pages = self._gauge("pages", "KV pages by state", "state")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_worker_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_worker_{name}", text, labels, registry=self.registry)

    def _start_at_nought(self) -> None:
        """Makes children exist before they are first counted: a rate then sees the step from nought."""
        for counter, values in (
            (self.pages, ("available", "cached", "used")),
            (self.prefix_hits, ("decode", "prefill")),
            (self.requests, [reason.value for reason in FinishReason]),
            (self.failures, FAILURE_KINDS),
            (self.lease_expiries, ("peer", "router")),
            (self.probes, ("arrived", "lost")),
        ):
            for value in values:
                counter.labels(value)

    @property
    def of_hand_overs(self) -> tuple[CollectorRegistry, Counter, Counter]:
        """What hand-overs are counted in: registry, failures by kind, lease expiries."""
        return self.registry, self.failures, self.lease_expiries

    def about(self, info: WorkerInfo) -> None:
        """Shows what this worker is."""
        labels = {
            "role": info.role.value,
            "model_name": info.model.name,
            "version": __version__,
            "incarnation": info.incarnation,
            "transport": info.transport,
            "kv_dtype": info.kv_dtype,
            "page_size": str(info.page_size),
        }
        Gauge("tandem_worker_info", "This worker", list(labels), registry=self.registry).labels(**labels).set(1)

    def compared(self, checked: int, corrupt: int) -> None:
        """How many cached pages were compared so far, and had changed."""
        before, self._compared = self._compared, (checked, corrupt)
        self.checked_pages.inc(checked - before[0])
        self.corrupt_pages.inc(corrupt - before[1])

    def serve(self, host: str, port: int, token: str = "") -> int:
        """Starts the page in a thread of its own; returns the port taken. Raises OSError when the port is not free.

        `/health` and `/ready` are there for probes, which have no token.

        token: what readers must show as a bearer token, if not empty.
        """
        page = self._with_state(self._with_alias(make_wsgi_app(self.registry)), token)
        kind = _PageV6 if ":" in host else _Page
        self._page = make_server(host, port, page, kind, _Quiet)
        threading.Thread(target=self._page.serve_forever, name="metrics", daemon=True).start()
        self._host = host
        return int(self._page.server_port)

    def _with_alias(self, metrics: WSGIApplication) -> WSGIApplication:
        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ.get("PATH_INFO") != ALIAS_PATH:
                return metrics(environ, start_response)
            if self.alias is None:
                start_response("404 Not Found", [("content-type", "text/plain")])
                return [b"not shown here: set metrics_alias to vllm\n"]
            start_response("200 OK", [("content-type", CONTENT_TYPE_LATEST)])
            return [self.alias()]

        return serve

    def _with_state(self, metrics: WSGIApplication, token: str) -> WSGIApplication:
        metrics = guarded(metrics, token) if token else metrics

        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO")
            if path not in ("/health", "/ready"):
                return metrics(environ, start_response)
            well = path == "/health" or self.ready()
            status = "200 OK" if well else "503 Service Unavailable"
            start_response(status, [("content-type", "text/plain")])
            return [b"ok\n" if well else b"not ready\n"]

        return serve

    def close(self) -> None:
        """Ends the page. Blocks for half a second at most, in which its thread looks whether it is to end."""
        if self._page is None:
            return
        ending = threading.Thread(target=self._page.shutdown)
        ending.start()
        # A connection wakes the page's thread at once.
        with contextlib.suppress(OSError):
            socket.create_connection((self._host, self._page.server_port), timeout=1.0).close()
        ending.join()
        self._page.server_close()
        self._page = None


class _Page(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any, **named: Any) -> None:
        self._lock = threading.Lock()
        self._ends: dict[Any, float] = {}  # by open connection, in monotonic seconds
        super().__init__(*args, **named)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._ends) >= CONNECTIONS
            if not full:
                self._ends[request] = time.monotonic() + CONNECTION_S
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Twice a second: ends what is late, which wakes its thread."""
        now = time.monotonic()
        with self._lock:  # none of them is closed, and its descriptor another's, meanwhile
            for request, end in self._ends.items():
                if end <= now:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._ends.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a reader of the metrics, %s: %r", client_address, sys.exception())


class _PageV6(_Page):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Says nothing."""


def guarded(page: WSGIApplication, token: str) -> WSGIApplication:
    """`page` for those who show the token."""
    digest = hashlib.sha256(token.encode()).digest()

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scheme, _, shown = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer" and same_secret(shown.strip(), digest):
            return page(environ, start_response)
        start_response("401 Unauthorized", [("www-authenticate", "Bearer"), ("content-type", "text/plain")])
        return [b"metrics need the metrics token\n"]

    return serve


class DraftMetrics:
    """What drafters are worth."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["drafter"], registry=registry)

        self._steps = counter("tandem_spec_steps", "Drafts verified")
        self._drafted = counter("tandem_spec_draft_tokens", "Tokens of drafts that were verified")
        self._accepted = counter("tandem_spec_accepted_tokens", "Draft tokens that were accepted")
        self._length = Histogram(
            "tandem_spec_accepted_length",
            "Tokens that a sequence got in a step with a draft: those accepted, and one more",
            ["drafter"],
            buckets=LENGTHS,
            registry=registry,
        )

    def add(self, outcome: DraftOutcome) -> None:
        """Counts a draft that was verified."""
        self._steps.labels(outcome.drafter).inc()
        self._drafted.labels(outcome.drafter).inc(outcome.drafted)
        self._accepted.labels(outcome.drafter).inc(outcome.accepted)
        self._length.labels(outcome.drafter).observe(outcome.accepted + 1)


class MoveCollector(Collector):
    """KV moved by pair and transport, read where it is counted. The router's page shows the same of the whole fleet."""

    def __init__(self, moves: Callable[[], Iterable[MoveStat]]) -> None:
        self._moves = moves

    def collect(self) -> Iterable[Metric]:
        """Three counters for each pair."""
        labels = ["sender", "receiver", "transport"]
        size = CounterMetricFamily("tandem_kv_moved_bytes", "KV bytes landed", labels=labels)
        time = CounterMetricFamily("tandem_kv_moved_seconds", "Seconds with KV under way", labels=labels)
        tickets = CounterMetricFamily("tandem_kv_handovers", "Hand-overs that landed KV", labels=labels)
        for move in self._moves():
            values = [move.sender, move.receiver, move.transport]
            size.add_metric(values, move.bytes)
            time.add_metric(values, move.seconds)
            tickets.add_metric(values, move.tickets)
        return (size, time, tickets)
