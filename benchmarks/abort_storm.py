"""An abort storm: up to nine of ten clients go away at random moments. What do the others have of it, what stays held?

Three kinds of round in turn, each with as many requests beginning at the same moments: `storm`, in which 89 % draw a
moment to give up: while they wait, while their prompt is computed or moved, or while they generate; `stay`, the same
offered load of which nobody goes away; and `alone`, only those that stay. The moments are drawn from nothing up to what
an answer takes (the median of a round in which nobody goes), so that some answers end before theirs: these are not
given up, and the report says how many were. Each request's own time counts, from its own begin to its last token: how
long a round lasts says little, since requests begin over most of it. Throughput is output tokens over the sum of those
times. Every prompt is drawn for its request alone: a cache has no more of one kind's than of another's, and the report
says what it had.

After each round a `pinned` one: as many requests, begun over a moment, are all given up at once, in whatever phase each
is. From then on the routers' counters and every worker's audit (pages, cache handles, sequences, tickets, slab ranges,
copies) are read until nothing is held: that is how long anything at all was pinned.

    python -m benchmarks.abort_storm [--rounds 21] [--rate 10]

It ends with 1 when something is still held half a minute after a round. 2,100 requests of a kind take 21 rounds, about
fifteen minutes. The figures mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx

from tandem.obs import REQUESTS_QUEUED, REQUESTS_RUNNING
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster

REQUESTS = 100
STAYING = 11
"""Of each round's requests; the other 89 % draw a moment to give up."""
PROMPT_TOKENS = 200
VOCABULARY = 250
OUTPUT_TOKENS = 120
KINDS = ("storm", "stay", "alone")
POLL_S = 0.01
HELD_S = 30.0
PINNED_SPREAD_S = 1.0
"""What is given up at once began within this."""


@dataclass
class Storm:
    """What was measured. Seconds are those of the requests that stay, each from its own begin."""

    own_s: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    first_s: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Until the first token."""
    cached_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Of the prompts of those that stay."""
    given_up: int = 0
    """Of those that had drawn a moment; the others' answers ended before it."""
    pinned_s: list[float] = field(default_factory=list)
    """From the moment at which all went away until nothing was held, or infinity; of each round."""
    still_held: int = 0
    """How often something was held longer than `HELD_S`, after rounds of any kind."""

    def throughput(self, kind: str) -> float:
        """Output tokens a second of those that stay, while each was served."""
        return OUTPUT_TOKENS * len(self.own_s[kind]) / sum(self.own_s[kind])

    def cached_share(self, kind: str) -> float:
        """Of the prompt tokens of those that stay, what a cache had."""
        return self.cached_tokens[kind] / (PROMPT_TOKENS * len(self.own_s[kind]))

    def add(self, kind: str, asked: Sequence[Asked], given_up: int) -> None:
        """One round."""
        self.own_s[kind] += [each.own_s for each in asked]
        self.first_s[kind] += [each.first_s for each in asked]
        self.cached_tokens[kind] += sum(each.cached_tokens for each in asked)
        self.given_up += given_up

    def text(self) -> str:
        """All of it."""
        storm = self.throughput("storm")
        drew = len(self.own_s["storm"]) * (REQUESTS - STAYING) // STAYING
        lines = [
            f"{kind}: {self.throughput(kind):.0f} tokens/s a request, first token after "
            f"{statistics.median(self.first_s[kind]) * 1000:.0f} ms, whole answer after "
            f"{statistics.median(self.own_s[kind]) * 1000:.0f} ms (medians of {len(self.own_s[kind])}), "
            f"{self.cached_share(kind):.1%} of the prompts cached"
            for kind in KINDS
        ]
        return "\n".join(
            (
                *lines,
                f"storm over stay {storm / self.throughput('stay'):.2f}, over alone "
                f"{storm / self.throughput('alone'):.2f}; {self.given_up} given up of {drew} that drew a moment to",
                f"pinned after all went away at once: median {statistics.median(self.pinned_s):.2f} s, "
                f"longest {max(self.pinned_s):.2f} s of {len(self.pinned_s)} times",
                *([f"still held after {HELD_S:g} s: {self.still_held} times"] if self.still_held else ()),
            )
        )


@dataclass(frozen=True)
class Asked:
    """One request, in seconds from its begin; answered: whether it came to its end."""

    answered: bool
    first_s: float
    own_s: float
    cached_tokens: int = 0


def prompt_of(seed: int) -> list[int]:
    """Tokens that no other seed's prompt begins with."""
    # Of a text: as numbers, a seed and its negative are one.
    return random.Random(f"prompt {seed}").choices(range(VOCABULARY), k=PROMPT_TOKENS)


async def ask(client: httpx.AsyncClient, seed: int, begins_s: float, leaves_s: float | None) -> Asked:
    """One request. Raises RuntimeError when it is not answered, and was not given up."""
    await asyncio.sleep(begins_s)
    body = {
        "model": "llama", "prompt": prompt_of(seed), "max_tokens": OUTPUT_TOKENS, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begun, first, before, last = time.monotonic(), 0.0, "", ""
    try:
        async with asyncio.timeout(leaves_s), client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                first = first or time.monotonic()
                if line:
                    before, last = last, line
    except TimeoutError:
        return Asked(False, 0.0, 0.0)
    if answer.status_code != 200 or last != "data: [DONE]":
        raise RuntimeError(f"not answered: {answer.status_code} {last}")
    own_s, usage = time.monotonic() - begun, json.loads(before.removeprefix("data: "))["usage"]
    return Asked(True, first - begun, own_s, usage["prompt_tokens_details"]["cached_tokens"])


async def play_round(
    client: httpx.AsyncClient, number: int, kind: str, rate: float, patience_s: float
) -> tuple[list[Asked], int]:
    """Those that stay, and how many were given up. rate: requests a second; patience_s: who leaves does so within."""
    source = random.Random(number)
    leaving, staying = [], []
    for index in range(REQUESTS):
        begins, leaves = source.uniform(0.0, REQUESTS / rate), source.uniform(0.0, patience_s)
        seed = (number * REQUESTS + index) * len(KINDS) + KINDS.index(kind)
        if index < STAYING:
            staying.append(ask(client, seed, begins, None))
        elif kind != "alone":
            leaving.append(asyncio.create_task(ask(client, seed, begins, leaves if kind == "storm" else None)))
    answers = await asyncio.gather(*staying)
    return answers, sum(not asked.answered for asked in await asyncio.gather(*leaving))


async def pinned(client: httpx.AsyncClient, running: Cluster, number: int) -> float:
    """Begins requests over a moment, gives all up at once; seconds until nothing is held anywhere.

    Raises RuntimeError when nothing was held to begin with.
    """
    source = random.Random(f"pinned {number}")
    seeds = range(-number * REQUESTS - REQUESTS, -number * REQUESTS)
    asks = [asyncio.create_task(ask(client, seed, source.uniform(0.0, PINNED_SPREAD_S), None)) for seed in seeds]
    await asyncio.sleep(PINNED_SPREAD_S)
    if not await asyncio.to_thread(_held, running):
        raise RuntimeError("nothing was held when all went away")
    for each in asks:
        each.cancel()
    held = asyncio.create_task(until_free(running))
    await asyncio.gather(*asks, return_exceptions=True)
    return await held


async def until_free(running: Cluster) -> float:
    """Seconds until no worker and no router holds anything; infinity if they still do after `HELD_S`."""
    begun = time.monotonic()
    while True:
        held = await asyncio.to_thread(_held, running)
        seconds = time.monotonic() - begun
        if not held:
            return seconds
        if seconds > HELD_S:
            return math.inf
        await asyncio.sleep(POLL_S)


def _held(running: Cluster) -> bool:
    if any(running.metric(name) for name in (REQUESTS_RUNNING, REQUESTS_QUEUED)):
        return True
    try:
        return any(running.audit(worker) for worker in running.workers.values())
    except grpc.RpcError:
        return True


async def measure(running: Cluster, rounds: int, rate: float) -> Storm:
    """Rounds of each kind in turn, after one that does not count and says how long an answer takes."""
    storm = Storm()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:
        warm, _ = await play_round(client, 0, "stay", rate, 0.0)
        patience_s = statistics.median(asked.own_s for asked in warm)
        for number in range(1, rounds + 1):
            # Each kind comes first, second and last equally often in three rounds.
            for kind in (KINDS[(number + turn) % len(KINDS)] for turn in range(len(KINDS))):
                asked, given_up = await play_round(client, number, kind, rate, patience_s)
                storm.add(kind, asked, given_up)
                storm.still_held += math.isinf(await until_free(running))
            storm.pinned_s.append(await pinned(client, running, number))
            storm.still_held += math.isinf(storm.pinned_s[-1])
    return storm


def main() -> int:
    """Prints what was measured; 1 if anything stayed held."""
    parser = argparse.ArgumentParser(description="An abort storm beside none")
    parser.add_argument("--rounds", type=int, default=21, help=f"of {REQUESTS} requests each; three, or a multiple")
    parser.add_argument("--rate", type=float, default=10.0, help="requests that begin in a second")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "llama", CheckpointSpec(family="llama", seed=1))
        workers, router = ["--kv-mib", "32"], ["--policy", "round_robin"]
        with cluster(model, Path(folder), 1, 1, workers, ["--local-prefill-tokens", "0"], router) as running:
            storm = asyncio.run(measure(running, given.rounds, given.rate))
    sys.stdout.write(f"{given.rounds} rounds, {given.rate:g} requests/s\n{storm.text()}\n")
    return 1 if storm.still_held else 0


if __name__ == "__main__":
    sys.exit(main())
