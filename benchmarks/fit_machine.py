"""Measures a Tandem cluster for the simulator: `python -m benchmarks.fit_machine machine.json --system tandem-4p2d`.

Requests are asked one at a time, with pauses: step times are those that the workers report on their metrics pages
meanwhile, and what lies between them is in the answers' pace. Each is asked twice: the second finds its prefix where it
will be decoded. What all processes, the client among them, spend beside steps is divided among requests and tokens by
comparing these short answers with long ones, less what an idle cluster spends. At last clients keep all cores busy: how
much more CPU time the same steps take then is the crowding. What a hand-over takes is measured on a second cluster,
whose policy makes one of every new prompt.

`tandem replay TRACE --machine machine.json` takes the result.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import httpx
import numpy as np
import psutil
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.client import Sample
from benchmarks.load import Endpoint, Load, run
from benchmarks.report import tpots, ttft
from benchmarks.shapes import checkpoint
from benchmarks.systems import Peers, Server, Setting, StartError, server
from benchmarks.workloads import Conversation, Shape, Turn, make
from tandem.cluster import StepTiming

MESSAGE_MS = 1.0
"""What the simulator takes for one message between processes."""
BATCH_TOKENS = 512
RUNNING = 64
"""The workers' defaults, with which they are started."""
FAST_LINK = 25e6
"""Bytes a millisecond where moving takes no time that could be measured."""
LENGTHS = (200, 400, 700, 1000, 1300)
SHORT_ANSWER, LONG_ANSWER = 16, 256
PAUSE_S = 0.15
"""Between requests asked one at a time: under most loads a process has slept before one comes."""
IDLE_S = 4.0
BANNER_S = 30.0
WORKER = re.compile(r"(?:prefill|decode)-\d+ +\S+ +pid (\d+) +(\d+) pages +metrics (\d+)")
"""A worker's line in what `tandem up` prints."""
PAGE_TOKENS = 16
ALWAYS_HANDS_OVER = "round_robin"
"""A policy that lets no decode worker compute a prompt that nobody knows; an idle cluster's own policy may."""


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

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(self.steps + other.steps, self.seconds + other.seconds, self.tokens + other.tokens)


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


def fit_pause(timing: StepTiming, answers: Sequence[Sample]) -> float:
    """Milliseconds between two steps, from answers that came alone: a worker takes them beside what its steps count.

    Raises ValueError when each answer came in one chunk.
    """
    if not (paces := tpots(answers)):
        raise ValueError("answers came in one chunk each, which says nothing of what lies between steps")
    return max(0.0, median(paces) * 1e3 - timing.base_ms - timing.per_token_ms)


def fit_around(timing: StepTiming, warm: Sequence[Sample]) -> float:
    """Milliseconds around a request, from prompts whose prefix is where they are decoded: one step, and one message."""
    step = timing.base_ms + timing.per_token_ms
    return max(0.0, median(ttft(each) * 1e3 for each in warm) - MESSAGE_MS - step)


def fit_hand_over(timing: StepTiming, around: float, cold: Sequence[Sample], kv_bytes: float) -> tuple[float, float]:
    """Milliseconds of a hand-over, and the bytes it moves in one, from prompts that were all handed over.

    kv_bytes: of a token.
    """

    def left(each: Sample) -> float:
        tokens = each.prompt_tokens - 1
        steps = 1 - (-tokens // BATCH_TOKENS)  # the last one is the decode worker's
        work = steps * timing.base_ms + each.prompt_tokens * timing.per_token_ms
        return ttft(each) * 1e3 - work - 2 * MESSAGE_MS - around

    lengths = sorted({each.prompt_tokens for each in cold})
    middles = [median(left(each) for each in cold if each.prompt_tokens == length) for length in lengths]
    slope, fixed = np.polyfit(lengths, middles, 1) if len(lengths) > 1 else (0.0, middles[0])
    if slope <= 0:
        return max(0.0, float(np.mean(middles))), FAST_LINK
    return max(0.0, float(fixed)), min(kv_bytes / float(slope), FAST_LINK)


@dataclass(frozen=True, slots=True)
class Spent:
    """What one load took of the machine."""

    seconds: float
    cpu_s: float
    """Of all processes of the cluster and of the client."""
    steps: Counts
    """Of all workers."""
    requests: int = 0
    tokens: int = 0
    """Of answers."""
    engine_s: float = 0.0
    """CPU of the workers' engine threads."""

    def with_pauses(self, pause_ms: float) -> Spent:
        """As if what a worker does between steps were a part of them."""
        return replace(self, steps=replace(self.steps, seconds=self.steps.seconds + self.steps.steps * pause_ms / 1e3))


def fit_host(idle: Spent, loads: Sequence[Spent]) -> tuple[float, float, float]:
    """Cores busy without any request; milliseconds of CPU beside steps on a request, and on each token of its answer.

    loads: at least two, with answers of different lengths, one request at a time: a step's time is its CPU then, unless
    other programs keep the cores busy, which is seen when nothing is left for requests. Raises ValueError.
    """
    background = idle.cpu_s / idle.seconds
    known = np.array([[each.requests, each.tokens] for each in loads], dtype=float)
    beside = np.array([each.cpu_s - each.steps.seconds - background * each.seconds for each in loads]) * 1e3
    (request, token), *_ = np.linalg.lstsq(known, beside, rcond=None)
    if request <= 0:
        raise ValueError(
            "steps took longer than the CPU time spent: other programs use the cores; fit when they do not"
        )
    return background, float(request), max(float(token), 0.0)


def fit_crowding(timing: StepTiming, alone: Sequence[Spent], full: Spent) -> float:
    """How much longer everything takes while all cores are busy, beyond waiting for a core: `Machine.crowding`.

    timing: of steps alone. full: a load that left no core free. Two threads of a core, and shared caches, show in the
    CPU time that the same steps take, whoever else had the core meanwhile: engines' CPU over what their steps would
    take alone, compared with what it is alone, where there is a little beside steps, too. Raises ValueError.
    """

    def over(loads: Sequence[Spent]) -> float:
        steps = functools.reduce(Counts.plus, [each.steps for each in loads])
        return (
            sum(each.engine_s for each in loads)
            * 1e3
            / (steps.steps * timing.base_ms + steps.tokens * timing.per_token_ms)
        )

    if not (usual := over(alone)):
        raise ValueError("engines took no CPU time: the workers' processes cannot be read")
    return max(0.0, over([full]) / usual - 1)


class Pages:
    """The metrics pages of some workers; read between loads alone, since that is work for the workers, too."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._client = httpx.Client(timeout=5)
        self._urls = urls

    def read(self) -> list[Counts]:
        """All of them now. Raises httpx.HTTPError."""
        return [counts(self._client.get(url).raise_for_status().text) for url in self._urls]


class Worker(NamedTuple):
    """One worker, as `tandem up` printed it."""

    pid: int
    pages: int
    """Of KV."""
    metrics: str
    """Its page's URL."""


def workers(log: str) -> list[Worker]:
    """From what `tandem up` printed. Raises ValueError."""
    lines = WORKER.findall(log)
    found = [Worker(int(pid), int(pages), f"http://127.0.0.1:{port}/metrics") for pid, pages, port in lines]
    if not found:
        raise ValueError("the log of tandem up names no workers")
    return found


def wait_for_workers(log: Path) -> list[Worker]:
    """As `workers`, of a file: one worker is enough for requests, and the list is printed when all have come."""
    deadline = time.monotonic() + BANNER_S
    while True:
        try:
            return workers(log.read_text(encoding="utf-8"))
        except ValueError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


class Meter:
    """One cluster that is measured. Its methods raise ConnectionError and httpx.HTTPError."""

    def __init__(self, url: str, group: int, known: Sequence[Worker], seed: int) -> None:
        """group: the process whose children are the cluster."""
        self._endpoint = Endpoint(url, asyncio.run(Endpoint(url).resolve()))
        self._cluster = psutil.Process(group)
        self._pages = Pages([each.metrics for each in known])
        self._workers = [psutil.Process(each.pid) for each in known]
        self._seed = seed
        self.alone: list[Counts] = []
        """Steps of each worker in each load that was asked one by one."""

    def idle(self) -> Spent:
        """What the cluster spends on nothing."""
        before = self._cpu_s()
        time.sleep(IDLE_S)
        return Spent(IDLE_S, self._cpu_s() - before, Counts())

    def one_by_one(self, lengths: Sequence[int], answer: int) -> tuple[Spent, list[tuple[Sample, Sample]]]:
        """Prompts of these lengths, each asked twice, alone; and what came of both times."""
        rng = random.Random(f"fit {self._seed} {len(self.alone)}")
        prompts = [tuple(rng.choices(range(8, 250), k=length)) for length in lengths]
        asked = [Conversation((Turn(prompt, answer),)) for prompt in prompts for _ in range(2)]

        async def each() -> list[Sample]:
            samples: list[Sample] = []
            for conversation in asked:
                samples += (await run(self._endpoint, [conversation], Load(concurrency=1))).samples
                await asyncio.sleep(PAUSE_S)
            return samples

        spent, samples, steps = self._spent(lambda: asyncio.run(each()))
        self.alone += steps
        return spent, list(zip(samples[::2], samples[1::2], strict=True))

    def together(self, requests: Sequence[Conversation], concurrency: int) -> Spent:
        """Many at once."""
        load = Load(concurrency=concurrency, seed=self._seed)
        return self._spent(lambda: list(asyncio.run(run(self._endpoint, requests, load)).samples))[0]

    def _spent(self, ask: Callable[[], list[Sample]]) -> tuple[Spent, list[Sample], list[Counts]]:
        seen = self._pages.read()
        threads = [self._threads(each) for each in self._workers]
        before, own, began = self._cpu_s(), time.thread_time(), time.perf_counter()
        samples = ask()
        seconds, cpu = time.perf_counter() - began, self._cpu_s() - before + time.thread_time() - own
        # A worker's engine is the thread that computes: all others of it together use less.
        engines = [
            max(seconds - old.get(thread, 0.0) for thread, seconds in self._threads(each).items())
            for each, old in zip(self._workers, threads, strict=True)
        ]
        steps = [now.since(old) for old, now in zip(seen, self._pages.read(), strict=True)]
        every = functools.reduce(Counts.plus, steps)
        tokens = sum(each.output_tokens for each in samples)
        return Spent(seconds, cpu, every, len(samples), tokens, sum(engines)), samples, steps

    def _threads(self, process: psutil.Process) -> dict[int, float]:
        """CPU seconds of each of its threads but the first, on which its event loop runs."""
        times = {each.id: each.user_time + each.system_time for each in process.threads()}
        return {thread: seconds for thread, seconds in times.items() if thread != process.pid}

    def _cpu_s(self) -> float:
        """Of the cluster's processes."""
        times = [each.cpu_times() for each in (self._cluster, *self._cluster.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def measure(one: Server, url: str, kv_mib: int, seed: int) -> tuple[StepTiming, dict[str, float]]:
    """What a step takes, and fields of `router.simulation.setting.Machine` but those of hand-overs.

    Raises ConnectionError, ValueError, httpx.HTTPError.
    """
    mixed = make("random", Shape(requests=110, input_tokens=600, output_tokens=64, spread=0.9), seed)
    asyncio.run(run(Endpoint(url), mixed[:20], Load(concurrency=3, seed=seed)))  # what is slow once is over
    known = wait_for_workers(one.log)
    assert one.process is not None
    meter = Meter(url, one.process.pid, known, seed)
    idle = meter.idle()
    short = [meter.one_by_one(LENGTHS, SHORT_ANSWER) for _ in range(4)]
    long = meter.one_by_one(LENGTHS, LONG_ANSWER)
    timing = fit_steps(meter.alone)
    full = meter.together(mixed[20:], 2 * len(known))
    tokens, alone = known[0].pages * PAGE_TOKENS, [spent for spent, _ in (*short, long)]
    crowding, pause = fit_crowding(timing, alone, full), fit_pause(timing, [each for pair in long[1] for each in pair])
    background, request, token = fit_host(idle, [each.with_pauses(pause) for each in alone])
    timing = replace(timing, base_ms=timing.base_ms + pause)
    around = fit_around(timing, [warm for _, pairs in short for _, warm in pairs])
    return timing, {
        "base_ms": timing.base_ms, "per_token_ms": timing.per_token_ms, "per_context_ms": 0.0,
        "overhead_ms": around, "request_cpu_ms": request, "token_cpu_ms": token, "background_cores": background,
        "crowding": crowding, "kv_bytes": kv_mib * 2**20 / tokens, "kv_tokens": tokens,
        "max_batch_tokens": BATCH_TOKENS, "max_running": RUNNING,
    }  # fmt: skip


def handed_over(url: str, seed: int) -> list[Sample]:
    """Prompts that nobody has computed, one by one, of a cluster that hands every one over. Raises ConnectionError."""
    lengths = [length for length in LENGTHS for _ in range(6)]
    rng = random.Random(f"fit hand-overs {seed}")
    rng.shuffle(lengths)

    async def each() -> list[Sample]:
        samples: list[Sample] = []
        for length in lengths:
            prompt = Conversation((Turn(tuple(rng.choices(range(8, 250), k=length)), SHORT_ANSWER),))
            samples += (await run(Endpoint(url), [prompt], Load(concurrency=1))).samples
            await asyncio.sleep(PAUSE_S)
        return samples

    return asyncio.run(each())[len(LENGTHS) :]  # what is slow once is over


def main(
    path: Path,
    system: Annotated[str, typer.Option(help="see benchmarks.compare")] = "tandem-4p2d",
    model: Annotated[str, typer.Option(help="see benchmarks.compare")] = "demo",
    kv_mib: Annotated[int, typer.Option(min=1, help="KV memory of each worker")] = 8,
    seed: int = 1,
) -> None:
    """Starts the cluster, measures it, writes the file."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this, the cluster ends too
    folder = Path(tempfile.mkdtemp(prefix="tandem-fit-"))
    setting, topology = Setting(checkpoint(model, None), kv_mib=kv_mib), "-".join(system.split("-")[:2])
    one: Server = server(system, setting, Peers(), folder)
    other: Server = server(
        f"{topology}-{ALWAYS_HANDS_OVER}", setting, Peers(), Path(tempfile.mkdtemp(prefix="tandem-fit-"))
    )
    try:
        with one.running() as url:
            timing, found = measure(one, url, kv_mib, seed)
        one.end()
        with other.running() as url:
            cold = handed_over(url, seed)
        moved = fit_hand_over(timing, found["overhead_ms"], cold, found["kv_bytes"])
        found |= dict(zip(("hand_over_ms", "link_bytes_per_ms"), moved, strict=True))
    except (ValueError, ConnectionError, StartError, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        one.end()
        other.end()
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
