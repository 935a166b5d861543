"""Runs one scenario and says what was wrong with it.

The invariants are those that distributed systems' tests name I1 to I8: every admitted request ends exactly once (I1),
with a prefix of the one right output and without gap or repeat (I2); at rest nothing is held on either side (I3), no
memory was used again under a transfer (I4), the router counts nothing in flight (I5) and its index knows no dead
incarnation (I6); nothing was sent to a draining worker while another would do (I7), nor more often than retries and
moves allow (I8). A calm run, and the loss of one worker beside another, are invisible to clients.

`python -m tests.simulation.run FIRST LAST` runs many seeds, with one number it shows that seed's trace.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.dispatch import Dispatcher
from router.dispatch_submit import Submitter
from router.moves import MAX_MOVES
from router.placer import MAX_CRASHES
from tandem.cluster import new_id
from tandem.errors import TandemError
from tandem.testing.engine import naive_continuation
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenIds
from tests.simulation.cluster import EOS, ROUTER, Cluster, simulated
from tests.simulation.scenario import Ask, Fault, Scenario, scenario
from tests.simulation.threads import virtual

REST_S = 40.0
"""Virtual seconds after the last client and the last fault until nothing may be held."""
PATIENCE_S = 120.0
"""Virtual seconds after which a client that has no end yet has been forgotten."""
STEP_S = 0.25
COUNTED_S = 1.5
"""Within this a cancellation is carried out and a status that knows of it arrives, however slow the engine."""


class Client:
    """Reads one request's answer, as the router's HTTP side does."""

    def __init__(self, cluster: Cluster, number: int, ask: Ask) -> None:
        self.ask, self.number, self.cluster = ask, number, cluster
        self.tokens: list[list[int]] = [[] for _ in range(ask.choices)]
        self.ends: list[list[FinishReason]] = [[] for _ in range(ask.choices)]
        self.errors: list[str] = []
        self.outcome = ""
        """answered, refused, left or broken; empty while it waits."""
        self.request_id = new_id()

    def _wrong(self, text: str) -> None:
        self.cluster.wrong.append(f"client {self.number}: {text}")

    # What the router's readers are told.

    def tokens_came(self, choice: int, first: int, tokens: Sequence[int]) -> None:
        """New tokens."""
        if first != len(self.tokens[choice]):
            self._wrong(f"I2: choice {choice} has {len(self.tokens[choice])} tokens and was told of number {first}")
        if self.ends[choice]:
            self._wrong(f"I1: choice {choice} goes on after its end")
        self.tokens[choice] += tokens

    def delta(self, delta: Delta) -> None:
        """New tokens and perhaps an end."""
        self.tokens_came(delta.choice, delta.first_index, delta.tokens)
        if delta.finish is not None:
            self.ends[delta.choice].append(delta.finish)
            if delta.finish is FinishReason.ERROR:
                self.errors.append(delta.error)

    async def run(self) -> None:
        """From the request to its end, whatever that is."""
        loop, cluster = asyncio.get_running_loop(), self.cluster
        await virtual().passes(self.ask.at)
        while cluster.control is None or cluster.router.dead or not cluster.control.dispatcher.ready():
            await virtual().passes(STEP_S)
        node, ended = cluster.router, asyncio.Event()
        node.on_death.append(ended.set)
        cluster.say(f"client {self.number} asks: {len(self.ask.prompt)} tokens, up to {self.ask.max_tokens} more")
        serving = node.start(self._serve(cluster.control.dispatcher))
        serving.add_done_callback(lambda _: ended.set())
        if self.ask.leaves_after_s is not None:
            loop.call_later(self.ask.leaves_after_s, serving.cancel)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await ended.wait()
        except TimeoutError:
            self._wrong("I1: it waits for ever")
        if node.dead and not self.outcome:
            self.outcome = "broken"
        elif serving.cancelled():
            self.outcome = "left"
        elif serving.done() and (error := serving.exception()) is not None:
            self._wrong(f"the router raised {error!r}")
        cluster.say(f"client {self.number} {self.outcome} {[len(made) for made in self.tokens]} {self.errors}")
        self.check()

    async def _serve(self, dispatcher: Dispatcher) -> None:
        ask = self.ask
        sampling = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens)
        request = GenerateRequest(self.request_id, "fake", ask.prompt, sampling, choices=ask.choices)
        try:
            accepted = await dispatcher.submit(request)
        except TandemError as error:
            self.outcome, self.errors = "refused", [str(error)]
            return
        async with accepted:
            await virtual().passes(ask.hesitates_s)
            await accepted.follow(_Reader(self))
            self.outcome = "answered"

    # I1 and I2.

    def check(self) -> None:
        """After its end."""
        expected = reference(self.ask.prompt, self.ask.max_tokens)
        for choice, made in enumerate(self.tokens):
            if made != expected[: len(made)]:
                self._wrong(f"I2: choice {choice} is {made}; {expected} is right")
            if self.outcome == "answered" and len(self.ends[choice]) != 1:
                self._wrong(f"I1: choice {choice} has the ends {self.ends[choice]}")
            if FinishReason.CANCELLED in self.ends[choice] and self.cluster.router.state.value == "running":
                self.errors.append("cancelled")
            whole = [FinishReason.LENGTH, FinishReason.STOP]
            if any(end in whole for end in self.ends[choice]) and made != expected:
                self._wrong(f"I2: choice {choice} ends after {len(made)} of {len(expected)} tokens")

    @property
    def served(self) -> bool:
        """Whether it got all it asked for."""
        return self.outcome == "answered" and not self.errors


class _Reader:
    """See `router.backend.Reader`."""

    def __init__(self, client: Client) -> None:
        self.tokens, self.delta = client.tokens_came, client.delta


def reference(prompt: TokenIds, max_tokens: int) -> list[int]:
    """The one right greedy output."""
    return naive_continuation(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens), frozenset((EOS,)))


@dataclass
class Result:
    """What came of a seed."""

    scenario: Scenario
    wrong: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """For a failing test: the trace's end, and what was wrong."""
        plan = [str(self.scenario.shape), *map(str, self.scenario.faults), str(self.scenario.mischief)]
        return "\n".join((f"seed {self.scenario.seed}", *plan, *self.log[-400:], *self.wrong))


async def _strike(cluster: Cluster, fault: Fault) -> None:
    """One fault, and its end."""
    await virtual().passes(fault.at)
    cluster.say(f"FAULT {fault}")
    name, wire = fault.target, cluster.net.wire(fault.target, fault.other)
    if fault.kind in ("kill", "terminate"):
        await _end_process(cluster, fault)
    elif fault.kind == "stop":
        node = cluster.node(name)
        node.stop()
        await virtual().passes(fault.lasts_s)
        node.go_on()
    elif fault.kind == "partition":
        wire.cut = True
        await virtual().passes(fault.lasts_s)
        cluster.net.mend(name, fault.other)
    elif fault.kind == "slow":
        wire.bytes_per_s, wire.latency = 20_000.0, (0.01, 0.2)
        await virtual().passes(fault.lasts_s)
        wire.bytes_per_s, wire.latency = 1e9, (0.0002, 0.002)
    elif fault.kind == "reset":
        cluster.net.reset(name, fault.other)
    cluster.say(f"END OF {fault.kind} {fault.target} {fault.other}")


async def _end_process(cluster: Cluster, fault: Fault) -> None:
    """Ends a process; if it has ended after a while it is started again at once, else by `_supervise`."""
    (cluster.kill if fault.kind == "kill" else cluster.terminate)(fault.target)
    await virtual().passes(fault.lasts_s)
    if cluster.node(fault.target).dead:
        cluster.start(fault.target)


async def _supervise(cluster: Cluster) -> None:
    """Starts again what has ended."""
    while True:
        await virtual().passes(0.5)
        for name in (ROUTER, *cluster.workers):
            if cluster.node(name).dead:
                cluster.start(name)


async def play(cluster: Cluster, plan: Scenario, result: Result) -> None:
    """The whole of a scenario."""
    cluster.start_router()
    for name in cluster.workers:
        cluster.start_worker(name)
    supervisor = asyncio.create_task(_supervise(cluster))
    while cluster.control is None or not _all_up(cluster):
        await virtual().passes(STEP_S)
    watch = _watch_plans(cluster, plan)
    load = asyncio.create_task(_watch_load(cluster)) if plan.calm else None
    clients = [Client(cluster, number, ask) for number, ask in enumerate(plan.asks)]
    strikes = [asyncio.create_task(_strike(cluster, fault)) for fault in plan.faults]
    await asyncio.gather(*(client.run() for client in clients), *strikes)
    for client in clients:
        result.outcomes[client.outcome] = result.outcomes.get(client.outcome, 0) + 1
        if (plan.calm or plan.one_crash) and client.outcome != "left" and not client.served:
            cluster.wrong.append(f"client {client.number} was {client.outcome}: {client.errors}")
    watch()
    if load is not None:
        load.cancel()
    await _rest(cluster, plan)
    supervisor.cancel()


def _all_up(cluster: Cluster) -> bool:
    control = cluster.control
    if control is None:
        return False
    fleet = control.fleet.snapshot()
    live = {worker.process.info.incarnation for worker in cluster.workers.values() if worker.up and worker.process}
    return {view.incarnation for view in (*fleet.prefill, *fleet.decode)} == live and len(live) == len(cluster.workers)


def _watch_plans(cluster: Cluster, plan: Scenario) -> Callable[[], None]:
    """I7 and I8: looks at every submission as the router decides on it. What is returned ends the watch."""
    shipped = Submitter.submit
    asked: dict[tuple[str, int], list[str]] = {}

    async def submit(self: Submitter, record: Any, info: Any, decided: Any) -> Any:
        views = self._fleet.snapshot().decode
        request = record.request
        if any(view.draining for view in views if view.incarnation == decided.decode):
            cluster.wrong.append(f"I7: {request.request_id} was sent to a draining worker")
        control = cluster.control
        if control is not None:
            broken = control.dispatcher.pairs.broken()
            sound = [each for each in decided.candidates if (each.prefill, each.decode) not in broken]
            if (decided.prefill, decided.decode) in broken and any(each.prefill != decided.prefill for each in sound):
                cluster.wrong.append(f"I7: {request.request_id} was sent to a broken pair")
        _check_attempts(cluster, plan, record, asked.setdefault((request.request_id, record.moves), []), decided.decode)
        return await shipped(self, record, info, decided)

    setattr(Submitter, "submit", submit)  # noqa: B010

    def end() -> None:
        setattr(Submitter, "submit", shipped)  # noqa: B010

    return end


def _check_attempts(cluster: Cluster, plan: Scenario, record: Any, asked: list[str], worker: str) -> None:
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


async def _watch_load(cluster: Cluster) -> None:
    """I5: no router takes a worker to have more than it sent there, but for a moment in which two statuses cross."""
    since: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    while True:
        await virtual().passes(0.02)
        control = cluster.control
        if control is None:
            continue
        sent: Counter[str | None] = Counter()
        for record in control.dispatcher._requests:
            sent[record.decode] += record.request.choices
        for view in control.fleet.snapshot().decode:
            if view.sequences <= sent[view.incarnation]:
                since.pop(view.incarnation, None)
            elif loop.time() - since.setdefault(view.incarnation, loop.time()) > COUNTED_S:
                cluster.wrong.append(f"I5: {view.sequences} sequences are counted, {dict(sent)} were sent")
                return


async def _rest(cluster: Cluster, plan: Scenario) -> None:
    """I3, I5 and I6: soon after everything is over, nothing is held anywhere and everybody serves."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + REST_S
    while held := await _held(cluster, plan):
        if loop.time() > deadline:
            cluster.wrong += [f"at rest: {line}" for line in held]
            return
        await virtual().passes(STEP_S)
    for worker in cluster.workers.values():
        assert worker.process is not None
        worker.process.engine.check_integrity()
        if plan.calm and (failures := _failures(worker.process.metrics)):
            cluster.wrong.append(f"{worker.name} counted {failures} failures, though nothing went wrong")
        if worker.process.failed or any(code not in (0, -9) for code in worker.ended):
            cluster.wrong.append(f"{worker.name} gave up: {worker.ended}")


def _failures(metrics: Any) -> dict[str, float]:
    found = {}
    for family in metrics.failures.collect():
        for sample in family.samples:
            if sample.name.endswith("_total") and sample.value:
                found[sample.labels["kind"]] = sample.value
    return found


async def _held(cluster: Cluster, plan: Scenario) -> list[str]:
    """What is still held, one line each."""
    control = cluster.control
    if control is None or cluster.router.dead or not _all_up(cluster):
        return ["not everybody is up"]
    held = [f"{ROUTER}: {line}" for line in control.dispatcher.leaks()]
    live = set()
    for worker in cluster.workers.values():
        assert worker.process is not None
        live.add(worker.process.info.incarnation)
        held += [f"{worker.name}: {line}" for line in worker.process.services.leaks()]
        held += [f"{worker.name}: {line}" for line in worker.process.engine.idle_leaks()]
        if uses := [use for use in worker.process.services.report().tenants if use.running]:
            held.append(f"{worker.name}: tenants use {uses}")
    views = (*control.fleet.snapshot().prefill, *control.fleet.snapshot().decode)
    held += [f"I5: {view.sequences:g} sequences are counted on {view.incarnation}" for view in views if view.sequences]
    known = set(control.index._tree.bits._bits)
    held += [f"I6: the index knows {incarnation}" for incarnation in sorted(known - live)]
    if len(control.index) > plan.shape.index_blocks:
        held.append(f"I6: the index has {len(control.index)} blocks; {plan.shape.index_blocks} are allowed")
    else:
        control.index.check_integrity()
    return held


def run(seed: int, plan: Scenario | None = None) -> Result:
    """Runs a seed, or another scenario with the seed's draws."""
    plan = plan or scenario(seed)
    result = Result(plan)
    with simulated(seed) as loop:
        cluster = Cluster(loop, plan.shape, plan.mischief)
        try:
            loop.run_until_complete(play(cluster, plan, result))
        except Exception as error:  # noqa: BLE001 - the seed's trace says more than the error alone
            cluster.wrong.append("".join(traceback.format_exception(error)))
        result.wrong = [*cluster.wrong, *cluster.fabric.wrong, *loop.failures]
        result.log, result.steps, result.seconds = cluster.log, loop.steps, loop.time()
    return result


def main(first: int, last: int, verbose: bool) -> int:
    """Runs seeds `first` to `last - 1`; returns how many found something. A single one shows its trace."""
    totals: Counter[str] = Counter()
    failed = 0
    for seed in range(first, last):
        result = run(seed)
        totals.update(result.outcomes)
        if result.wrong or verbose:
            failed += bool(result.wrong)
            sys.stdout.write(f"{result}\n" if verbose else f"seed {seed}: {result.wrong[:3]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"seeds {first}..{last - 1}: {failed} failed; clients {dict(totals)}\n")
    return failed


if __name__ == "__main__":
    bounds = [int(argument) for argument in sys.argv[1:]]
    single = len(bounds) == 1
    sys.exit(1 if main(bounds[0], bounds[0] + 1 if single else bounds[1], single) else 0)
