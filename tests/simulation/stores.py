"""What the processes keep, and whether it agrees with itself: that holds at every moment, whatever goes wrong."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

from decode_worker.services import DecodeServices
from prefill_worker.services import PrefillServices
from router.control import ControlPlane
from tandem.worker.process import WorkerProcess
from tests.simulation.cluster import ROUTER, Cluster

Store = tuple[str, Callable[[], None]]
"""Its name, and what raises AssertionError when it contradicts itself."""


def contradictions(cluster: Cluster) -> list[str]:
    """One line for each store that contradicts itself."""
    found = []
    for name, check in _stores(cluster):
        try:
            check()
        except AssertionError as error:
            (place,) = traceback.extract_tb(error.__traceback__)[-1:]
            found.append(f"{name} contradicts itself: {str(error) or place.line}")
    return found


def _stores(cluster: Cluster) -> Iterator[Store]:
    if cluster.control is not None and not cluster.router.dead:
        yield from _of_router(cluster.control)
    for worker in cluster.workers.values():
        if worker.up and worker.process is not None:
            for name, check in _of_worker(worker.process):
                yield f"{worker.name}: the {name}", check


def _of_router(control: ControlPlane) -> Iterator[Store]:
    dispatcher = control.dispatcher
    for worker in control.fleet.known():
        yield f"I5: the load of {worker.incarnation}", worker.ledger.check_integrity
    for name, check in (
        ("index", control.index.check_integrity),
        ("memory of tails", dispatcher.tails.check_integrity),
        ("heat of prefixes", dispatcher._replicator.heat.check_integrity),
        ("hit ladder", control.ladder.check_integrity),
        ("memory of stories", control.recorder.check_integrity),
    ):
        yield f"{ROUTER}: the {name}", check
    if not dispatcher.admission.queued:  # who gives up waiting stands in the queue until its own turn
        yield f"{ROUTER}: the admission", dispatcher.admission.check_integrity


def _of_worker(process: WorkerProcess) -> Iterator[Store]:
    services = process.services
    assert isinstance(services, DecodeServices | PrefillServices)
    yield "engine", process.engine.check_integrity
    yield "memory of promises", process.publisher.promises.check_integrity
    yield "sending end", services._handover.check_integrity
    yield "budget of slabs", services._budget.check_integrity
    for pair in services._pairs._pairs.values():
        yield f"pair with {pair.peer}", pair.check_integrity
