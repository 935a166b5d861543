"""What must hold while a scenario runs: I7 and I8 at each decision of the router, I5 while all is calm."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from router.control import ControlPlane
from router.dispatch_submit import Submitter
from router.moves import MAX_MOVES
from router.open_request import OpenRequest
from router.placer import MAX_CRASHES
from router.workers.snapshot import FleetSnapshot, Load, WorkerView
from tandem.cluster import Plan, Role
from tests.simulation.cluster import Cluster
from tests.simulation.scenario import Scenario
from tests.simulation.stores import contradictions
from tests.simulation.threads import virtual

COUNTED_S = 1.5
"""Within this a cancellation is carried out and a status that knows of it arrives, however slow the engine."""
LOOK_S = 0.02
TURNS = 100
"""Of the loop, from one look at all stores to the next."""


def watch_plans(cluster: Cluster, plan: Scenario) -> Callable[[], None]:
    """I7 and I8: looks at every submission as the router decides on it. What is returned ends the watch."""
    shipped = Submitter.submit
    asked: dict[tuple[str, int], list[str]] = {}

    async def submit(self: Submitter, record: Any, info: Any, decided: Plan) -> Any:
        name = record.request.request_id
        # Nothing was awaited since the plan was made: the router knows what it knew then.
        cluster.wrong += [f"I7: {name} {line}" for line in _draining(decided, self._fleet.snapshot())]
        if cluster.control is not None and _through_broken(decided, cluster.control):
            cluster.wrong.append(f"I7: {name} was sent to a broken pair")
        _check_attempts(cluster, plan, record, asked.setdefault((name, record.moves), []), decided.decode)
        return await shipped(self, record, info, decided)

    setattr(Submitter, "submit", submit)  # noqa: B010

    def end() -> None:
        setattr(Submitter, "submit", shipped)  # noqa: B010

    return end


def _draining(decided: Plan, fleet: FleetSnapshot) -> list[str]:
    """Draining workers that a plan names. The next best count, too: they are asked where the first do not answer."""
    named = {name for pair in decided.candidates for name in (pair.decode, pair.prefill)}
    views = (view for view in (*fleet.prefill, *fleet.decode) if view.draining and view.incarnation in named)
    return [f"was planned with the draining {view.info.role.value} worker {view.incarnation}" for view in views]


def _through_broken(decided: Plan, control: ControlPlane) -> bool:
    """Whether a plan begins with a broken pair though it has a sound one with another prefill worker."""
    broken = control.dispatcher.pairs.broken()
    sound = [each for each in decided.candidates if (each.prefill, each.decode) not in broken]
    return (decided.prefill, decided.decode) in broken and any(each.prefill != decided.prefill for each in sound)


def _check_attempts(cluster: Cluster, plan: Scenario, record: OpenRequest, asked: list[str], worker: str) -> None:
    """I8: a request is placed once and then once for each move, and each time asks a worker at most once.

    asked: workers of this placement so far. A crash allows one move and no second, a calm cluster none at all.
    """
    name = record.request.request_id
    if worker in asked:
        cluster.wrong.append(f"I8: {name} asks {worker} twice in one placement")
    asked.append(worker)
    if len(asked) > 1 + cluster.retries:
        cluster.wrong.append(f"I8: {name} asks {len(asked)} workers in one placement")
    if record.moves > (0 if plan.calm else 1 if plan.one_crash else MAX_MOVES):
        cluster.wrong.append(f"I8: {name} is moved {record.moves} times")
    if record.losses >= MAX_CRASHES:
        cluster.wrong.append(f"I8: {name} is submitted after {record.losses} workers were lost over it")


def watch_stores(cluster: Cluster) -> None:
    """Looks at all stores now and then, and at the router's queue at every turn; ends with what it finds."""
    turns = 0

    def look() -> None:
        nonlocal turns
        turns += 1
        found = contradictions(cluster) if turns % TURNS == 0 else []
        if cluster.control is not None and _waits_in_vain(cluster.control):
            found.append("somebody waits at the router although there is room")
        if found:
            cluster.wrong += found
            cluster.loop.watchers.remove(look)

    cluster.loop.watchers.append(look)


def _waits_in_vain(control: ControlPlane) -> bool:
    """Whether somebody could be let in and is not. While no worker can be used, one may be back in a moment."""
    admission = control.dispatcher.admission
    return bool(admission.queued) and math.isfinite(admission._room()) and admission._open()


async def watch_load(cluster: Cluster) -> None:
    """I5: no router takes a worker to have more than it sent there, but for a moment in which two statuses cross."""
    since: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    while True:
        await virtual().passes(LOOK_S)
        control = cluster.control
        if control is None:
            continue
        fleet, records = control.fleet.snapshot(), list(control.dispatcher._requests)
        for view in (*fleet.prefill, *fleet.decode):
            counted, most = _counted(view), _most(view, records)
            if _within(counted, most):
                since.pop(view.incarnation, None)
            elif loop.time() - since.setdefault(view.incarnation, loop.time()) > COUNTED_S:
                cluster.wrong.append(f"I5: {counted} is counted on {view.incarnation}, at most {most} was sent there")
                return


def _counted(view: WorkerView) -> Load:
    return Load(view.sequences, view.queued_tokens, view.info.capacity_tokens - view.free_tokens)


def _within(counted: Load, most: Load) -> bool:
    return (
        counted.sequences <= most.sequences
        and counted.prefill_tokens <= most.prefill_tokens
        and counted.kv_tokens <= most.kv_tokens
    )


def _most(view: WorkerView, records: Sequence[OpenRequest]) -> Load:
    """All that the open requests can come to on a worker. Which prefill worker has one, the decode worker may change.

    Its prompt counts as computed for each choice, and the last page of each as full.
    """
    total = Load()
    for record in records:
        if view.info.role is Role.PREFILL or record.decode == view.incarnation:
            request = record.request
            tokens = len(request.prompt) + request.sampling.max_tokens
            total += Load(request.choices, request.choices * tokens, request.choices * (tokens + view.info.page_size))
    return total
