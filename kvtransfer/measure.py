"""The hand-over's hooks as Prometheus series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvtransfer.base import Hooks
from tandem.cluster import Incarnation

Moved = Callable[[Incarnation, str, int, float], None]


class HandOverMetrics:
    """What both ends of a worker's hand-overs hold now. Failures go to the worker's own counter, by kind."""

    def __init__(self, registry: CollectorRegistry, failures: Counter) -> None:
        self._failures = failures
        self._tickets = Gauge("tandem_kv_open_tickets", "Hand-overs under way, by end", ["end"], registry=registry)
        self._sends = Gauge("tandem_kv_pending_sends", "Spans posted and not yet complete", registry=registry)
        self._quarantined = Gauge(
            "tandem_kv_quarantined_bytes", "Landing slabs of peers that may still write", registry=registry
        )

    def failed(self, kind: str) -> None:
        """One failure."""
        self._failures.labels(kind).inc()

    def receiver(self, moved: Moved) -> Hooks:
        """Hooks for the end that asks for KV."""
        tickets = self._tickets.labels("receiver").inc
        return Hooks(moved=moved, failed=self.failed, open_tickets=tickets, quarantined=self._quarantined.inc)

    def sender(self) -> Hooks:
        """Hooks for the end that gives it. What was moved is counted where it lands."""
        tickets = self._tickets.labels("sender").inc
        return Hooks(failed=self.failed, open_tickets=tickets, pending_sends=self._sends.inc)
