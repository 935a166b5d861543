"""The hand-over's hooks as Prometheus series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvtransfer.base import Hooks
from tandem.cluster import Incarnation

Moved = Callable[[Incarnation, str, int, float], None]


class HandOverMetrics:
    """What both ends of a worker's hand-overs hold now.

    Failures go to the worker's own counters: leases that ran out, and by kind all else.
    """

    def __init__(self, registry: CollectorRegistry, failures: Counter, lease_expiries: Counter) -> None:
        self._failures, self._lease_expiries = failures, lease_expiries
        self._tickets = Gauge("tandem_kv_open_tickets", "Hand-overs under way, by end", ["end"], registry=registry)
        self._sends = Gauge("tandem_kv_pending_sends", "Spans posted and not yet complete", registry=registry)
        self._quarantined = Gauge(
            "tandem_kv_quarantined_bytes", "Landing slabs of peers that may still write", registry=registry
        )

    def failed(self, kind: str) -> None:
        """One failure."""
        (self._lease_expiries.labels("peer") if kind == "lease" else self._failures.labels(kind)).inc()

    def receiver(self, moved: Moved) -> Hooks:
        """Hooks for the end that asks for KV."""
        tickets = self._tickets.labels("receiver").inc
        return Hooks(moved=moved, failed=self.failed, open_tickets=tickets, quarantined=self._quarantined.inc)

    def sender(self, moved: Moved) -> Hooks:
        """Hooks for the end that gives it. The bytes are counted where they land."""
        tickets = self._tickets.labels("sender").inc
        return Hooks(moved=moved, failed=self.failed, open_tickets=tickets, pending_sends=self._sends.inc)
