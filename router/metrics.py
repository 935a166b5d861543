"""The router's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from router.admission.quota import Visit
from router.requests.job import Job
from router.requests.openai import GenerationBody
from tandem import obs
from tandem.errors import NotFound

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """What is said at `/metrics` or below it."""

    media_type: str
    make: Callable[[], bytes]


class RouterMetrics:
    """All metrics of one router; `page().make()` is what Prometheus scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pages = {"": Page(CONTENT_TYPE, lambda: generate_latest(self.registry))}
        """Prometheus', and what others find at `/metrics/NAME`."""
        counter, histogram, gauge = self._counter, self._histogram, self._gauge
        self.requests = counter(obs.REQUESTS_TOTAL, "HTTP requests by end", "endpoint", "outcome")
        self.failures = counter(obs.FAILURES_TOTAL, "requests that ended in an error, by kind", "kind")
        self.running = gauge(obs.REQUESTS_RUNNING, "requests that a worker has taken and that have not ended")
        self.queued = gauge(obs.REQUESTS_QUEUED, "requests received that no worker has taken yet")
        self.queue = histogram(obs.QUEUE_SECONDS, "receipt to a worker's acceptance", SECONDS)
        self.first_token = histogram(obs.FIRST_TOKEN_SECONDS, "receipt to first token", SECONDS)
        self.outputs = _Outputs()
        self.registry.register(self.outputs)
        self.duration = histogram(obs.REQUEST_SECONDS, "receipt to end", SECONDS)
        self.prompt_tokens = counter(obs.PROMPT_TOKENS_TOTAL, "prompt tokens of finished requests")
        self.cached_tokens = counter(obs.CACHED_TOKENS_TOTAL, "of those, tokens whose KV was not computed again")
        self.spliced_tokens = counter(obs.SPLICED_TOKENS_TOTAL, "prompt tokens taken from remembered turns")
        self.encoded_tokens = counter(obs.ENCODED_TOKENS_TOTAL, "prompt tokens that were tokenised or given")

    def add_collector(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Adds families that `collect` makes at each scrape: what the fleet reports, for instance."""
        self.registry.register(_Called(collect))

    def page(self, name: str = "") -> Page:
        """One of the pages, by the last part of its path. Raises NotFound."""
        if name not in self.pages:
            raise NotFound(f"there is no page {name[:64]!r} of metrics; there are {', '.join(sorted(self.pages)[1:])}")
        return self.pages[name]

    def start(self, endpoint: str) -> RequestTimer:
        """A request has been received."""
        return RequestTimer(self, endpoint)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=buckets)


class RequestTimer:
    """Times one request; `end` must be called exactly once, whatever happens."""

    def __init__(self, metrics: RouterMetrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}
        self._accepted = False
        self._ended = False
        self.visit: Visit | None = None
        """The tenant's, which ends with the request."""
        self._made = 0
        metrics.queued.inc()

    def received(self) -> None:
        """Its body has been read, and who asks is known; for tracing."""

    def tokenised(self, job: Job, body: GenerationBody) -> None:
        """It is work for the cluster; for tracing."""

    def accepted(self) -> None:
        """A worker has taken it."""
        self._accepted = True
        self._metrics.queued.dec()
        self._metrics.running.inc()
        self._metrics.queue.observe(time.perf_counter() - self._start)

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of a choice came at once; what passed since the last ones is shared among them."""
        now = time.perf_counter()
        last = self._last.get(choice)
        outputs = self._metrics.outputs
        if last is not None:
            outputs.observe((now - last) / count)
        elif not self._last:
            self._metrics.first_token.observe(now - self._start)
        self._last[choice] = now
        self._made += count
        outputs.tokens += count

    def prompt(self, tokens: int, cached: int) -> None:
        """How long the prompts were, and how much of them was cached."""
        self._metrics.prompt_tokens.inc(tokens)
        self._metrics.cached_tokens.inc(cached)

    def end(self, outcome: str, failure: str | None = None) -> None:
        """outcome: ok, refused, failed, cancelled or slow_client. failure: the error's kind, if it was one."""
        assert not self._ended, "a request ends once"
        self._ended = True
        if self.visit is not None:
            self.visit.end(self._made)
        (self._metrics.running if self._accepted else self._metrics.queued).dec()
        self._metrics.requests.labels(self._endpoint, outcome).inc()
        self._metrics.duration.observe(time.perf_counter() - self._start)
        if failure is not None:
            self._metrics.failures.labels(failure).inc()


class _Outputs(Collector):
    """What is counted for each token: plain numbers, since a lock a token would cost more than all else here."""

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0
        self._counts = [0] * (len(TOKEN_SECONDS) + 1)

    def observe(self, seconds: float) -> None:
        """Time between two tokens of a choice."""
        self._seconds += seconds
        self._counts[bisect_left(TOKEN_SECONDS, seconds)] += 1

    def collect(self) -> Iterable[Metric]:
        """Both families."""
        bounds = [*map(floatToGoString, TOKEN_SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(obs.INTER_TOKEN_SECONDS, "between tokens of a choice", buckets, self._seconds)
        yield CounterMetricFamily(obs.COMPLETION_TOKENS_TOTAL, "output tokens received", self.tokens)


class _Called(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not call the collector before there is anything to report."""
        return ()
