"""What the fleet reports, on the router's own metrics page."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.workers.fleet import Fleet

MOVE_LABELS = ["sender", "receiver", "transport"]
WORKER_LABELS = ["role", "worker"]


class FleetMetrics:
    """Collects at each scrape. KV moved is counted here across workers' deaths: a counter never goes back."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """KV by pair and transport, and load by worker."""
        size = CounterMetricFamily("tandem_kv_moved_bytes", "KV bytes landed", labels=MOVE_LABELS)
        time = CounterMetricFamily("tandem_kv_moved_seconds", "Seconds with KV under way", labels=MOVE_LABELS)
        tickets = CounterMetricFamily("tandem_kv_handovers", "Hand-overs that landed KV", labels=MOVE_LABELS)
        for move in self._fleet.moves():
            labels = [move.sender, move.receiver, move.transport]
            size.add_metric(labels, move.bytes)
            time.add_metric(labels, move.seconds)
            tickets.add_metric(labels, move.tickets)
        return [size, time, tickets, *self._load()]

    def _load(self) -> list[Metric]:
        running = GaugeMetricFamily("tandem_fleet_running", "Sequences in the batch", labels=WORKER_LABELS)
        waiting = GaugeMetricFamily("tandem_fleet_waiting", "Sequences not yet in it", labels=WORKER_LABELS)
        free = GaugeMetricFamily("tandem_fleet_free_pages", "KV pages free or reclaimable", labels=WORKER_LABELS)
        total = GaugeMetricFamily("tandem_fleet_pages", "KV pages", labels=WORKER_LABELS)
        draining = GaugeMetricFamily("tandem_fleet_draining", "1 while it gets no new requests", labels=WORKER_LABELS)
        fleet = self._fleet.snapshot()
        for view in (*fleet.prefill, *fleet.decode):
            labels = [view.info.role.value, view.info.address]
            running.add_metric(labels, view.status.running)
            waiting.add_metric(labels, view.status.waiting)
            free.add_metric(labels, view.status.free_pages)
            total.add_metric(labels, view.status.total_pages)
            draining.add_metric(labels, view.draining)
        return [running, waiting, free, total, draining]
