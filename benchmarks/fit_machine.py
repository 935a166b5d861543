"""Measures a Tandem cluster for the simulator: `python -m benchmarks.fit_machine machine.json --system tandem-4p2d`.

Step times are those that the workers report on their metrics pages while prompts and answers of all lengths run beside
one another. What a request costs beside its steps comes from requests asked one at a time, each twice: the second finds
its prefix where it will be decoded, so that the first one's rest is the hand-over.

`tandem replay TRACE --machine machine.json` takes the result.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import numpy as np
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.client import Sample
from benchmarks.load import Endpoint, Load, run
from benchmarks.report import ttft
from benchmarks.shapes import checkpoint
from benchmarks.systems import Peers, Server, Setting, StartError, server
from benchmarks.workloads import Conversation, Shape, Turn, make
from tandem.cluster import StepTiming

POLL_S = 0.25
MESSAGE_MS = 1.0
"""What the simulator takes for one message between processes."""
BATCH_TOKENS = 512
RUNNING = 64
"""The workers' defaults, with which they are started."""
FAST_LINK = 25e6
"""Bytes a millisecond where moving takes no time that could be measured."""
LENGTHS = (200, 400, 700, 1000, 1300)
WORKER = re.compile(r"(prefill|decode)-\d+ +\S+ +pid \d+ +(\d+) pages +metrics (\d+)")
"""A worker's line in what `tandem up` prints."""
PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Counts:
    """One worker's counters at one moment."""

    steps: float = 0.0
    seconds: float = 0.0
    """That its steps took, without waiting for a core."""
    tokens: float = 0.0

    def since(self, other: Counts) -> Counts:
        """What was added."""
        return Counts(
            self.steps - other.steps,
            self.seconds - other.seconds,
            self.tokens - other.tokens,
        )


SERIES = {
    "tandem_worker_step_seconds_count": "steps",
    "tandem_worker_step_seconds_sum": "seconds",
    "tandem_worker_step_tokens_total": "tokens",
}


def counts(page: str) -> Counts:
    """From a worker's Prometheus page."""
    found = dict.fromkeys(SERIES.values(), 0.0)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in SERIES:
                found[SERIES[sample.name]] += sample.value
    return Counts(**found)


def fit_steps(intervals: Iterable[Counts]) -> StepTiming:
    """Milliseconds of a step and of each token in it, by least squares over intervals. Raises ValueError."""
    rows = [each for each in intervals if each.steps]
    if len({each.tokens / each.steps for each in rows}) < 2:
        raise ValueError("workers ran too few steps of different sizes to fit what a step takes")
    # Each weighs as much as it has time in it.
    weights = np.array([each.seconds**-0.5 for each in rows])
    known = np.array([[each.steps, each.tokens] for each in rows]) * weights[:, None]
    took = np.array([each.seconds for each in rows]) * 1e3 * weights
    (base, per_token), *_ = np.linalg.lstsq(known, took, rcond=None)
    return StepTiming(max(float(base), 0.0), max(float(per_token), 0.0))


def fit_request(
    timing: StepTiming, pairs: Sequence[tuple[Sample, Sample]], kv_bytes: float
) -> tuple[float, float, float]:
    """Milliseconds around a request and of a hand-over, and the bytes it moves in one, from requests asked twice.

    kv_bytes: of a token.
    """
    step = timing.base_ms + timing.per_token_ms
    around = max(0.0, median(ttft(warm) * 1e3 for _, warm in pairs) - MESSAGE_MS - step)

    def left(cold: Sample) -> float:
        tokens = cold.prompt_tokens - 1
        steps = -(-tokens // BATCH_TOKENS)
        return ttft(cold) * 1e3 - steps * timing.base_ms - tokens * timing.per_token_ms - step - 2 * MESSAGE_MS - around

    lengths = sorted({cold.prompt_tokens for cold, _ in pairs})
    middles = [median(left(cold) for cold, _ in pairs if cold.prompt_tokens == length) for length in lengths]
    slope, fixed = np.polyfit(lengths, middles, 1) if len(lengths) > 1 else (0.0, middles[0])
    if slope <= 0:
        return around, max(0.0, float(np.mean(middles))), FAST_LINK
    return around, max(0.0, float(fixed)), min(kv_bytes / float(slope), FAST_LINK)


class Pages:
    """The metrics pages of some workers, read now and then in a thread of its own."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._client = httpx.Client(timeout=5)
        self._urls = urls

    def read(self) -> list[Counts]:
        """All of them now. Raises httpx.HTTPError."""
        return [counts(self._client.get(url).raise_for_status().text) for url in self._urls]

    @contextmanager
    def watched(self) -> Iterator[list[Counts]]:
        """What was added in each interval, worker by worker; complete at the end."""
        intervals: list[Counts] = []
        ended, seen = threading.Event(), [self.read()]

        def watch() -> None:
            while not ended.wait(POLL_S):
                seen.append(self.read())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield intervals
        finally:
            ended.set()
            thread.join()
            seen.append(self.read())
            for before, after in pairwise(seen):
                intervals += [now.since(old) for old, now in zip(before, after, strict=True)]


def workers(log: str) -> list[tuple[int, str]]:
    """KV pages and metrics page of each worker, from what `tandem up` printed. Raises ValueError."""
    found = [(int(pages), f"http://127.0.0.1:{port}/metrics") for _, pages, port in WORKER.findall(log)]
    if not found:
        raise ValueError("the log of tandem up names no workers")
    return found


def measure(url: str, log: Path, kv_mib: int, seed: int) -> dict[str, float]:
    """Fields of `router.simulation.setting.Machine`. Raises ConnectionError, ValueError, httpx.HTTPError."""
    endpoint, rng = Endpoint(url), random.Random(f"fit {seed}")
    closed = Load(concurrency=3, seed=seed)
    mixed = make("random", Shape(requests=90, input_tokens=600, output_tokens=64, spread=0.9), seed)
    asyncio.run(run(endpoint, mixed[:20], closed))  # what is slow once is over
    known = workers(log.read_text(encoding="utf-8"))
    pages, tokens = Pages([page for _, page in known]), known[0][0] * PAGE_TOKENS
    with pages.watched() as intervals:
        asyncio.run(run(endpoint, mixed[20:], closed))
    timing = fit_steps(intervals)
    prompts = [tuple(rng.choices(range(8, 250), k=length)) for length in LENGTHS * 4]
    asked = [
        asyncio.run(run(endpoint, [Conversation((Turn(prompt, 16),))] * 2, Load(concurrency=1))).samples
        for prompt in prompts
    ]
    kv_bytes = kv_mib * 2**20 / tokens
    around, hand_over, rate = fit_request(timing, [(cold, warm) for cold, warm in asked], kv_bytes)
    return {
        "base_ms": timing.base_ms, "per_token_ms": timing.per_token_ms, "per_context_ms": 0.0,
        "overhead_ms": around, "hand_over_ms": hand_over, "link_bytes_per_ms": rate,
        "kv_bytes": kv_bytes, "kv_tokens": tokens, "max_batch_tokens": BATCH_TOKENS, "max_running": RUNNING,
    }  # fmt: skip


def main(
    path: Path,
    system: Annotated[str, typer.Option(help="see benchmarks.compare")] = "tandem-4p2d",
    model: Annotated[str, typer.Option(help="see benchmarks.compare")] = "demo",
    kv_mib: Annotated[int, typer.Option(min=1, help="KV memory of each worker")] = 8,
    seed: int = 1,
) -> None:
    """Starts the cluster, measures it, writes the file."""
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="tandem-fit-"))
    one: Server = server(system, Setting(checkpoint(model, None), kv_mib=kv_mib), Peers(), folder)
    try:
        with one.running() as url:
            found = measure(url, one.log, kv_mib, seed)
    except (ValueError, ConnectionError, StartError, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        one.end()
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
