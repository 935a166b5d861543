"""What happens in one seed: the cluster's shape, what clients ask, what goes wrong when. All drawn from the seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from tandem.testing.engine import VOCAB
from tests.simulation.cluster import ROUTER, Shape
from tests.simulation.memory import Mischief

EXACT = (9914, 16318)
"""Seeds that found something while callers still heard at once that their connection broke, and asked for less."""
CRASHES = ("kill", "terminate")
KINDS = ("kill", "kill", "stop", "terminate", "partition", "slow", "reset", "reset", "router", "drain_router")


@dataclass(frozen=True)
class Ask:
    """One client's request."""

    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    choices: int = 1
    min_tokens: int = 0
    stops: tuple[int, ...] = ()
    """Tokens that end it, beside the model's own."""
    logprobs: bool = False
    hesitates_s: float = 0.0
    """It reads nothing for so long."""
    leaves_after_s: float | None = None
    """It goes away."""


@dataclass(frozen=True)
class Fault:
    """Something goes wrong at a moment, and is put right after a while."""

    at: float
    kind: str
    target: str
    other: str = ""
    lasts_s: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """Everything of one seed that is decided beforehand."""

    seed: int
    shape: Shape
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    mischief: Mischief

    @property
    def calm(self) -> bool:
        """Whether nothing goes wrong, so that nothing may fail."""
        return not self.faults and self.mischief == Mischief()

    @property
    def one_crash(self) -> bool:
        """Whether all that goes wrong is the loss of one worker beside which another of its role serves.

        Of prefill workers there need be no other: the decode workers compute then.
        """
        if self.mischief != Mischief() or len(self.faults) != 1 or self.faults[0].kind not in CRASHES:
            return False
        if self.faults[0].target == ROUTER:
            return False
        return self.faults[0].target.startswith("prefill") or self.shape.decode > 1


def _shape(random: Random) -> Shape:
    return Shape(
        prefill=random.choice((0, 1, 1, 2)),
        decode=random.choice((1, 2, 2)),
        pages=random.choice((20, 40, 80)),
        page_size=random.choice((4, 16)) if random.random() < 0.5 else 16,
        slab_tokens=random.choice((171, 256, 512)),
        span_tokens=random.choice((8, 16, 32)),
        max_batch_tokens=random.choice((16, 64, 256)),
        step_s=random.choice(((0.001, 0.01), (0.01, 0.05), (0.02, 0.2))),
        write_s=random.choice(((0.0005, 0.02), (0.01, 0.3))),
        policy=random.choice(("cost", "round_robin", "least_loaded", "longest_prefix")),
    )


def _asks(random: Random, shape: Shape) -> tuple[Ask, ...]:
    most = shape.pages * shape.page_size
    documents = [tuple(random.randrange(VOCAB) for _ in range(160)) for _ in range(2)]
    asks = []
    for _ in range(random.randint(2, 7)):
        begin = random.choice(documents)[: random.choice((0, 20, 64, 100, 160))]
        prompt = (*begin, *(random.randrange(VOCAB) for _ in range(random.randint(1, 40))))
        max_tokens = random.choice((1, 4, 12, 30))
        prompt = prompt[-max(1, most - max_tokens - shape.page_size) :]
        asks.append(
            Ask(
                at=random.uniform(0.0, 2.5),
                prompt=prompt,
                max_tokens=max_tokens,
                choices=2 if random.random() < 0.15 else 1,
                hesitates_s=random.uniform(0.0, 1.0) if random.random() < 0.1 else 0.0,
                leaves_after_s=random.expovariate(4.0) if random.random() < 0.2 else None,
            )
        )
    return tuple(sorted(asks, key=lambda ask: ask.at))


def _sampled(random: Random, ask: Ask) -> Ask:
    """The same request, perhaps with what has to go on from its place when another worker does."""
    least = random.choice((0, 0, ask.max_tokens // 2, ask.max_tokens))
    stops = (random.randrange(VOCAB),) if random.random() < 0.2 else ()
    return replace(ask, min_tokens=least, stops=stops, logprobs=random.random() < 0.25)


def _fault(random: Random, workers: list[str]) -> Fault:
    kind, at = random.choice(KINDS), random.uniform(0.0, 3.5)
    target = random.choice(workers)
    if kind in ("router", "drain_router"):
        return Fault(at, "kill" if kind == "router" else "terminate", ROUTER, lasts_s=random.uniform(0.3, 2.0))
    if kind in ("partition", "slow", "reset"):
        other = random.choice([name for name in (*workers, ROUTER) if name != target])
        return Fault(at, kind, target, other, random.choice((0.3, 1.0, 3.0, 6.0)))
    if kind == "stop":
        return Fault(at, kind, random.choice((*workers, ROUTER)), lasts_s=random.choice((0.3, 1.0, 2.5, 5.0)))
    return Fault(at, kind, target, lasts_s=random.uniform(0.05, 2.0))


def _mischief(random: Random) -> Mischief:
    mischief = Mischief()
    if random.random() < 0.25:
        name = random.choice(("fail", "corrupt", "double", "lose"))
        mischief = replace(mischief, **{name: random.choice((0.02, 0.2))})
    return mischief


def scenario(seed: int) -> Scenario:
    """The scenario of a seed: one in ten without any fault, two in ten with a single crash."""
    random, more = Random(f"scenario {seed}"), Random(f"bounds {seed}")
    blocks, notice_s = more.choice((2, 5, 4_000_000)), more.choice((0.0, 0.0, 0.005, 0.05))
    shape = replace(_shape(random), index_blocks=blocks, notice_s=0.0 if seed in EXACT else notice_s)
    asks = _asks(random, shape)
    if seed not in EXACT:
        own, gate = Random(f"sampling {seed}"), Random(f"gate {seed}")
        asks = tuple(_sampled(own, ask) for ask in asks)
        inflight, backlog = gate.choice((2, 3, 1024)), gate.choice((1, 2, 128))
        shape = replace(shape, max_inflight=inflight, worker_backlog=backlog)
    workers = [f"prefill-{n}" for n in range(shape.prefill)] + [f"decode-{n}" for n in range(shape.decode)]
    kind = random.random()
    if kind < 0.1:
        return Scenario(seed, shape, asks, (), Mischief())
    if kind < 0.3:
        crash = Fault(random.uniform(0.0, 3.5), random.choice(CRASHES), random.choice(workers), lasts_s=1.0)
        return Scenario(seed, shape, asks, (crash,), Mischief())
    faults = sorted((_fault(random, workers) for _ in range(random.randint(1, 4))), key=lambda fault: fault.at)
    return Scenario(seed, shape, asks, tuple(faults), _mischief(random))
