"""An abort storm: nine of ten clients go away at random moments. What do the others have of it, and what stays held?

Rounds in turn: the requests that stay alone, and the same ones among those that are given up - while they wait, while
their prompt is computed, moved, or while they generate. Reported: output tokens a second of those that stay, with and
without the storm, and how long after a round's last end any worker held anything.

    python -m benchmarks.abort_storm [--rounds 20]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster

REQUESTS = 100
STAYING = 11
"""Of each round's requests; 89 % are given up."""
PROMPT_TOKENS = 200
OUTPUT_TOKENS = 60
SPREAD_S = 2.0
"""A round's requests begin within this."""
PATIENCE_S = 1.5
"""Who goes away does so within this."""
POLL_S = 0.02
HELD_S = 30.0


@dataclass
class Storm:
    """What was measured."""

    calm: list[float] = field(default_factory=list)
    """Output tokens a second of those that stay, without a storm; of each round."""
    stormy: list[float] = field(default_factory=list)
    held_s: list[float] = field(default_factory=list)
    """Seconds from the last end of each stormy round until nothing is held."""

    @property
    def ratio(self) -> float:
        """Throughput with the storm over that without, medians."""
        return statistics.median(self.stormy) / statistics.median(self.calm)


async def ask(client: httpx.AsyncClient, seed: int, begins_s: float, leaves_s: float | None) -> int:
    """One request; its output tokens, 0 for one that was given up. Raises RuntimeError when it is not answered."""
    await asyncio.sleep(begins_s)
    prompt = [(seed * 31 + position * 17 + seed * position) % 250 for position in range(PROMPT_TOKENS)]
    body = {"model": "llama", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
    try:
        async with asyncio.timeout(leaves_s), client.stream("POST", "/v1/completions", json=body) as answer:
            text = [line async for line in answer.aiter_lines() if line.startswith("data:")]
    except TimeoutError:
        return 0
    if answer.status_code != 200 or text[-1] != "data: [DONE]":
        raise RuntimeError(f"not answered: {answer.status_code} {text[-1:]}")
    return OUTPUT_TOKENS


async def play_round(client: httpx.AsyncClient, number: int, storm: bool) -> float:
    """Output tokens a second of those that stay."""
    source = random.Random(number)
    asks, staying = [], []
    for index in range(REQUESTS):
        begins, leaves = source.uniform(0.0, SPREAD_S), source.uniform(0.0, PATIENCE_S)
        seed = (number * REQUESTS + index) * 2 + storm
        if index < STAYING:
            staying.append(ask(client, seed, begins, None))
        elif storm:
            asks.append(asyncio.create_task(ask(client, seed, begins, leaves)))
    begun = time.monotonic()
    tokens = sum(await asyncio.gather(*staying))
    seconds = time.monotonic() - begun
    await asyncio.gather(*asks)
    return tokens / seconds


async def until_free(running: Cluster) -> float:
    """Seconds until no worker holds anything."""
    begun = time.monotonic()
    while time.monotonic() - begun < HELD_S:
        held = await asyncio.gather(*(asyncio.to_thread(running.audit, each) for each in running.workers.values()))
        if not any(held):
            break
        await asyncio.sleep(POLL_S)
    return time.monotonic() - begun


async def measure(running: Cluster, rounds: int) -> Storm:
    """Rounds with and without a storm in turn, after one of each that does not count."""
    storm = Storm()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:
        for number in range(rounds + 1):
            calm = await play_round(client, number, storm=False)
            stormy = await play_round(client, number, storm=True)
            held = await until_free(running)
            if number:
                storm.calm.append(calm)
                storm.stormy.append(stormy)
                storm.held_s.append(held)
    return storm


def main() -> int:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description="An abort storm beside none")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {REQUESTS} requests each")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "llama", CheckpointSpec(family="llama", seed=1))
        with cluster(model, Path(folder), 1, 1, ["--kv-mib", "32"]) as running:
            storm = asyncio.run(measure(running, rounds))
    sys.stdout.write(
        f"{rounds * REQUESTS} requests, {REQUESTS - STAYING} % given up: those that stay have "
        f"{statistics.median(storm.stormy):.0f} tokens/s with the storm, {statistics.median(storm.calm):.0f} without, "
        f"{storm.ratio:.2f}x; longest hold after a round {max(storm.held_s):.2f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
