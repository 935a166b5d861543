"""I3, I5 and I6: soon after everything is over nothing is held, counted or remembered of what is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from decode_worker.services import DecodeServices
from router.control import ControlPlane
from router.workers.snapshot import Load, WorkerView
from tandem.worker.process import WorkerProcess
from tests.simulation.cluster import ROUTER, Cluster
from tests.simulation.scenario import Scenario
from tests.simulation.stores import contradictions
from tests.simulation.threads import virtual

REST_S = 40.0
"""Virtual seconds after the last client and the last fault until nothing may be held."""
STEP_S = 0.25


async def rest(cluster: Cluster, plan: Scenario) -> None:
    """Waits for it, and says what is still held after `REST_S`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + REST_S
    while held := _held(cluster, plan):
        if loop.time() > deadline:
            cluster.wrong += [f"at rest: {line}" for line in held]
            return
        await virtual().passes(STEP_S)
    for worker in cluster.workers.values():
        assert worker.process is not None
        if plan.calm and (failures := _failures(worker.process.metrics)):
            cluster.wrong.append(f"{worker.name} counted {failures} failures, though nothing went wrong")
        if worker.process.failed or any(code not in (0, -9) for code in worker.ended):
            cluster.wrong.append(f"{worker.name} gave up: {worker.ended}")


def all_up(cluster: Cluster) -> bool:
    """Whether the router can use every worker's present process, and no other."""
    return cluster.control is not None and _usable(cluster.control) == _live(cluster)


def _usable(control: ControlPlane) -> set[str]:
    fleet = control.fleet.snapshot()
    return {view.incarnation for view in (*fleet.prefill, *fleet.decode)}


def _live(cluster: Cluster) -> set[str] | None:
    """Incarnations; None while somebody is not up."""
    up = [worker.process.info.incarnation for worker in cluster.workers.values() if worker.up and worker.process]
    return set(up) if len(up) == len(cluster.workers) else None


def _failures(metrics: Any) -> dict[str, float]:
    found = {}
    for family in metrics.failures.collect():
        for sample in family.samples:
            if sample.name.endswith("_total") and sample.value:
                found[sample.labels["kind"]] = sample.value
    return found


def _held(cluster: Cluster, plan: Scenario) -> list[str]:
    """What is still held, one line each."""
    control, live = cluster.control, _live(cluster)
    if control is None or cluster.router.dead or live is None or not all_up(cluster):
        return ["not everybody is up"]
    held = [f"{ROUTER}: {line}" for line in control.dispatcher.leaks()]
    for worker in cluster.workers.values():
        assert worker.process is not None
        held += [f"{worker.name}: {line}" for line in _held_by(worker.process, control.fleet.router_id)]
    fleet = control.fleet.snapshot()
    for view in (*fleet.prefill, *fleet.decode):
        held += [f"I5: {line} on {view.incarnation}" for line in _counted(view)]
    held += [f"I6: the {name} knows {who}" for name, known in _names(control) for who in sorted(known - live)]
    if len(control.index) > plan.shape.index_blocks:
        held.append(f"I6: the index has {len(control.index)} blocks; {plan.shape.index_blocks} are allowed")
    return held + contradictions(cluster)


def _held_by(process: WorkerProcess, router_id: str) -> Iterator[str]:
    """What a worker holds and should not. router_id: of the only router that it need know."""
    yield from process.services.leaks()
    yield from process.engine.idle_leaks()
    if uses := [use for use in process.services.report().tenants if use.running]:
        yield f"tenants use {uses}"
    if isinstance(process.services, DecodeServices):
        worker = process.services.worker
        if worker._choices:
            yield f"the choices {sorted(worker._choices)} are open"
        for gone in sorted((worker.dispatches.keys() | worker._outboxes.keys()) - {router_id}):
            yield f"the router {gone} is remembered"


def _counted(view: WorkerView) -> Iterator[str]:
    """What the router takes an idle worker to have to do: what it was told and what it adds to that."""
    if view.sequences:
        yield f"{view.sequences} sequences are counted"
    if view.queued_tokens:
        yield f"{view.queued_tokens} tokens are queued"
    if view.free_tokens != view.info.capacity_tokens:
        yield f"{view.free_tokens} of {view.info.capacity_tokens} tokens are free"
    if view.pending != Load():
        yield f"{view.pending} is pending"


def _names(control: ControlPlane) -> Iterator[tuple[str, set[str]]]:
    """Whom each store of the router knows."""
    dispatcher = control.dispatcher
    yield "fleet", {worker.incarnation for worker in control.fleet.known()}
    yield "index", set(control.index._tree.bits._bits)
    yield "memory of tails", {tail.worker for tail in dispatcher.tails._tails.values()}
    yield "health of pairs", set(dispatcher.pairs._receivers)
    yield "quotas", set(control.quotas._reported)
    yield "streams", set(dispatcher._streams)
