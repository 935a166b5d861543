"""Runs one scenario and says what was wrong with it.

The invariants are those that distributed systems' tests name I1 to I8: every admitted request ends exactly once (I1),
with a prefix of the one right output and without gap or repeat, log-probabilities included (I2); at rest nothing is
held on either side (I3), no memory was used again under a transfer (I4), the router counts no sequence and no token in
flight (I5) and knows no dead incarnation (I6); nothing was planned with a draining worker (I7), nor sent more often
than retries and moves allow (I8). What processes keep agrees with itself all the time (`stores.py`). A calm run, and
the loss of one worker beside another, are invisible to clients. `watch.py` looks while it runs, `rest.py` at the end.

`python -m tests.simulation.run FIRST LAST` runs many seeds, with one number it shows that seed's trace.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.dispatch import Dispatcher
from tandem.cluster import new_id
from tandem.errors import TandemError
from tandem.testing.engine import naive_continuation
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams
from tests.simulation.cluster import EOS, ROUTER, Cluster, simulated
from tests.simulation.rest import STEP_S, all_up, rest
from tests.simulation.scenario import Ask, Fault, Scenario, scenario
from tests.simulation.threads import virtual
from tests.simulation.watch import watch_load, watch_plans, watch_stores

PATIENCE_S = 120.0
"""Virtual seconds after which a client that has no end yet has been forgotten."""
LOGPROB = -0.5
"""Of every token of the simulated model."""


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
        """New tokens, and nothing beside them."""
        if not tokens:
            self._wrong(f"I2: choice {choice} was told of no tokens")
        if self.ask.logprobs:
            self._wrong(f"I2: choice {choice} has {tokens} from number {first} on without their log-probabilities")
        self._add(choice, first, tokens)

    def delta(self, delta: Delta) -> None:
        """New tokens and perhaps an end."""
        told = [(each.token, each.logprob) for each in delta.logprobs]
        if told != [(token, LOGPROB) for token in delta.tokens if self.ask.logprobs]:
            self._wrong(f"I2: choice {delta.choice} has {delta.tokens} with the log-probabilities {told}")
        self._add(delta.choice, delta.first_index, delta.tokens)
        if delta.finish is not None:
            self.ends[delta.choice].append(delta.finish)
            if delta.finish is FinishReason.ERROR:
                self.errors.append(delta.error)

    def _add(self, choice: int, first: int, tokens: Sequence[int]) -> None:
        if first != len(self.tokens[choice]):
            self._wrong(f"I2: choice {choice} has {len(self.tokens[choice])} tokens and was told of number {first}")
        if self.ends[choice]:
            self._wrong(f"I1: choice {choice} goes on after its end")
        self.tokens[choice] += tokens

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
        request = GenerateRequest(self.request_id, "fake", ask.prompt, sampling_of(ask), choices=ask.choices)
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
        expected = reference(self.ask)
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


def sampling_of(ask: Ask) -> SamplingParams:
    """Greedy: the simulated model has no likelihoods to draw from, to penalise or to mask."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=ask.max_tokens,
        min_tokens=ask.min_tokens,
        stop_token_ids=ask.stops,
        logprobs=0 if ask.logprobs else None,
    )


def reference(ask: Ask) -> list[int]:
    """The one right output."""
    return naive_continuation(ask.prompt, sampling_of(ask), frozenset((EOS, *ask.stops)))


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
    while cluster.control is None or not all_up(cluster):
        await virtual().passes(STEP_S)
    watch = watch_plans(cluster, plan)
    watch_stores(cluster)
    load = asyncio.create_task(watch_load(cluster)) if plan.calm else None
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
    await rest(cluster, plan)
    supervisor.cancel()


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
