"""CVE-2025-46570, PROMPTPEEK: how soon a first token comes tells nothing of another tenant's prompts.

In virtual time, with the cluster's own noise of steps and links: only what the cluster does takes time, so that a small
sample tells what a large one would on a clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest

from router.dispatch import Dispatcher
from tandem.cluster import new_id
from tandem.testing.engine import VOCAB
from tandem.types import Delta, GenerateRequest, SamplingParams
from tests.simulation.cluster import Cluster, Shape, simulated
from tests.simulation.memory import Mischief
from tests.simulation.rest import STEP_S, all_up
from tests.simulation.threads import virtual

PROMPTS = 16
TOKENS = 192
SURE = 2.58
"""Deviations of Mann and Whitney's statistic that chance exceeds once in a hundred."""


class _Nobody:
    """Reads an answer and keeps nothing of it: a `router.backend.Reader`."""

    def tokens(self, choice: int, first: int, tokens: Sequence[int]) -> None:
        """New tokens."""

    def delta(self, delta: Delta) -> None:
        """New tokens and perhaps an end."""


def deviations(first: Sequence[float], second: Sequence[float]) -> float:
    """How much smaller `first` is, by Mann and Whitney's rank test: positive where it is, 0 where they are alike."""
    wins = sum((a < b) + (a == b) / 2 for a in first for b in second)
    one, other = len(first), len(second)
    return (wins - one * other / 2) / math.sqrt(one * other * (one + other + 1) / 12)


async def first_token_s(dispatcher: Dispatcher, prompt: tuple[int, ...], tenant: str) -> float:
    """Virtual seconds from a request to its only token."""
    begun = virtual().time()
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    request = GenerateRequest(new_id(), "fake", prompt, sampling, tenant=tenant, salt=f"salt of {tenant}")
    async with await dispatcher.submit(request) as accepted:
        await accepted.follow(_Nobody())
    return virtual().time() - begun


async def times(cluster: Cluster) -> dict[str, list[float]]:
    """First tokens of prompts that the asking tenant, another one or nobody has asked before, in turns."""
    cluster.start_router()
    for name in cluster.workers:
        cluster.start_worker(name)
    while not all_up(cluster):
        await virtual().passes(STEP_S)
    assert cluster.control is not None
    dispatcher, source = cluster.control.dispatcher, Random(1)
    found: dict[str, list[float]] = {"own": [], "another's": [], "nobody's": []}

    async def ask() -> None:
        for _ in range(PROMPTS):
            for kind, before in (("own", "spy"), ("another's", "victim"), ("nobody's", "")):
                prompt = tuple(source.randrange(VOCAB) for _ in range(TOKENS))
                if before:
                    await first_token_s(dispatcher, prompt, before)
                else:
                    await first_token_s(dispatcher, tuple(source.randrange(VOCAB) for _ in range(TOKENS)), "victim")
                await virtual().passes(1.0)
                found[kind].append(await first_token_s(dispatcher, prompt, "spy"))

    await cluster.router.start(ask())
    return found


@pytest.mark.parametrize("policy", ["cost", "longest_prefix"])
def test_first_tokens_do_not_tell_what_another_tenant_asked(policy: str) -> None:
    shape = Shape(prefill=2, decode=2, pages=200, max_batch_tokens=16, policy=policy)  # type: ignore[arg-type]
    with simulated(5) as loop:
        found = loop.run_until_complete(times(Cluster(loop, shape, Mischief())))
    assert deviations(found["own"], found["nobody's"]) > SURE, "a prompt of one's own is faster, or nothing is measured"
    assert abs(deviations(found["another's"], found["nobody's"])) < SURE
