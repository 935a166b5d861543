"""What the fleet reports, on the router's own metrics page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.workers.fleet import END_CAUSES, Fleet
from router.workers.snapshot import WorkerView
from tandem.cluster import Role

MOVE_LABELS = ["sender", "receiver", "transport"]
WORKER_LABELS = ["role", "worker"]
STATES = ("ready", "draining", "silent")


class FleetMetrics:
    """Collects at each scrape. KV moved is counted here across workers' deaths: a counter never goes back."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """KV by pair and transport, load by worker, workers by state, and how many were lost."""
        return [*self._moves(), *self._load(), *self._workers()]

    def _moves(self) -> list[Metric]:
        size = CounterMetricFamily("tandem_kv_moved_bytes", "KV bytes landed", labels=MOVE_LABELS)
        time = CounterMetricFamily("tandem_kv_moved_seconds", "Seconds with KV under way", labels=MOVE_LABELS)
        tickets = CounterMetricFamily("tandem_kv_handovers", "Hand-overs that landed KV", labels=MOVE_LABELS)
        failures = CounterMetricFamily(
            "tandem_kv_handover_failures", "Hand-overs that the way between the two failed", labels=MOVE_LABELS
        )
        for move in self._fleet.moves():
            labels = [move.sender, move.receiver, move.transport]
            size.add_metric(labels, move.bytes)
            time.add_metric(labels, move.seconds)
            tickets.add_metric(labels, move.tickets)
            failures.add_metric(labels, move.failures)
        return [size, time, tickets, failures]

    def _load(self) -> list[Metric]:
        def gauge(name: str, text: str, more: tuple[str, ...] = ()) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"tandem_fleet_{name}", text, labels=[*WORKER_LABELS, *more])

        running = gauge("running", "Sequences in the batch")
        waiting = gauge("waiting", "Sequences not yet in it")
        queued = gauge("queued_tokens", "Prompt tokens still to be computed")
        free = gauge("free_pages", "KV pages free or reclaimable")
        total = gauge("pages", "KV pages")
        draining = gauge("draining", "1 while it gets no new requests")
        about = gauge("worker_info", "Which incarnation is at an address", ("incarnation", "transport"))
        for view in self._views():
            labels, status = [view.info.role.value, view.info.address], view.status
            running.add_metric(labels, status.running)
            waiting.add_metric(labels, status.waiting)
            queued.add_metric(labels, status.queued_tokens)
            free.add_metric(labels, status.free_pages)
            total.add_metric(labels, status.total_pages)
            draining.add_metric(labels, view.draining)
            about.add_metric([*labels, view.info.incarnation, view.info.transport], 1)
        return [running, waiting, queued, free, total, draining, about]

    def _views(self) -> tuple[WorkerView, ...]:
        fleet = self._fleet.snapshot()
        return (*fleet.prefill, *fleet.decode)

    def _workers(self) -> list[Metric]:
        """All roles and states, those without workers too: an alert must see a nought, not a gap."""
        states = GaugeMetricFamily("tandem_fleet_workers", "Workers known, by state", labels=["role", "state"])
        counts = Counter((view.info.role, "draining" if view.draining else "ready") for view in self._views())
        counts += Counter((worker.info.role, "silent") for worker in self._fleet.known() if not worker.usable)
        ends = CounterMetricFamily(
            "tandem_fleet_workers_ended", "Incarnations gone, by cause", labels=["role", "cause"]
        )
        leases = CounterMetricFamily(
            "tandem_fleet_lease_expiries", "Times that a worker was silent for a whole lease", labels=["role"]
        )
        for role in Role:
            for state in STATES:
                states.add_metric([role.value, state], counts[role, state])
            for cause in END_CAUSES:
                ends.add_metric([role.value, cause], self._fleet.ends[role, cause])
            leases.add_metric([role.value], self._fleet.lease_expiries[role])
        return [states, ends, leases]
