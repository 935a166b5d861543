"""Measures a Tandem cluster for the simulator: `python -m benchmarks.fit_machine machine.json --system tandem-4p2d`.

Requests are asked one at a time, with pauses: step times are those that the workers report on their metrics pages
meanwhile, and what lies between them is in the answers' pace. Each is asked three times: the second time it is longer,
and computed behind the first's prefix; the third finds its prefix where it will be decoded. What all processes, the
client among them, spend beside steps is divided among requests and tokens by comparing these short answers with long
ones, less what an idle cluster spends. What a hand-over takes is measured on a second cluster, whose policy makes one
of every new prompt. At last prompts come at random times: how much longer steps, and what surrounds a request, take
while several processes want the cores is what gives the simulator the same time of all steps, and the same time to
first token, as the mean of the middle half: the median says little where half of the prompts find the cores idle, and
the mean is that of a few.

`tandem replay TRACE --machine machine.json` takes the result; `benchmarks.simulator_check` asks whether it is right.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import psutil
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.client import Sample
from benchmarks.fits import (
    BATCH_TOKENS,
    Counts,
    Spent,
    fit_around,
    fit_by_simulation,
    fit_hand_over,
    fit_host,
    fit_pause,
    fit_steps,
    looked_back,
    middle,
)
from benchmarks.load import Endpoint, Load, run
from benchmarks.report import ttft
from benchmarks.shapes import checkpoint
from benchmarks.systems import TANDEM, Peers, Server, Setting, StartError, server
from benchmarks.workloads import Conversation, Shape, Turn, make
from router.policies.cost import CostPolicy
from router.simulation import setting as simulated
from router.simulation.replay import Replay
from router.simulation.setting import Arrival, Machine

RUNNING = 64
"""The workers' default, with which they are started."""
BLOCK_TOKENS = 8
"""Blocks of the simulated caches: what two prompts share ends anywhere in a page, on average in its middle."""
RATE, RANDOM = 6.0, 160
"""Prompts a second that come at random times, and how many."""
MIXED = Shape(RANDOM, input_tokens=300, output_tokens=64, spread=0.9)
LENGTHS = (200, 400, 700, 1000, 1300)
MORE = 128
"""Tokens that a prompt is longer by when it is asked again."""
EACH = 3
"""Prompts of a length. All of them fit into a worker's cache."""
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
        self._seed = seed
        self._loads = 0

    def idle(self) -> Spent:
        """What the cluster spends on nothing."""
        before = self._cpu_s()
        time.sleep(IDLE_S)
        return Spent(IDLE_S, self._cpu_s() - before, Counts())

    def prompts(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """That nobody has seen."""
        self._loads += 1
        rng = random.Random(f"fit {self._seed} {self._loads}")
        return [tuple(rng.choices(range(8, 250), k=length)) for length in lengths]

    def one_by_one(self, prompts: Sequence[tuple[int, ...]], answer: int) -> tuple[Spent, list[Sample]]:
        """Each alone, after a pause; and what came of them."""

        async def each() -> list[Sample]:
            samples: list[Sample] = []
            for prompt in prompts:
                asked = Conversation((Turn(prompt, answer),))
                samples += (await run(self._endpoint, [asked], Load(concurrency=1))).samples
                await asyncio.sleep(PAUSE_S)
            return samples

        return self._spent(lambda: asyncio.run(each()))

    def _spent(self, ask: Callable[[], list[Sample]]) -> tuple[Spent, list[Sample]]:
        seen = self._pages.read()
        time.sleep(PAUSE_S)  # pages are work for the workers: the first request comes after a pause as the others do
        before, own, began = self._cpu_s(), time.thread_time(), time.perf_counter()
        samples = ask()
        seconds, cpu = time.perf_counter() - began, self._cpu_s() - before + time.thread_time() - own
        steps = [now.since(old) for old, now in zip(seen, self._pages.read(), strict=True)]
        every = functools.reduce(Counts.plus, [*steps, *map(looked_back, samples)])
        tokens = sum(each.output_tokens for each in samples)
        return Spent(seconds, cpu, every, len(samples), tokens), samples

    def _cpu_s(self) -> float:
        """Of the cluster's processes."""
        times = [each.cpu_times() for each in (self._cluster, *self._cluster.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def measure(one: Server, url: str, kv_mib: int, seed: int) -> dict[str, Any]:
    """Fields of `router.simulation.setting.Machine`, of hand-overs and of processes that hinder one another excepted.

    Raises ConnectionError, ValueError, httpx.HTTPError.
    """
    warm_up = make("random", replace(MIXED, requests=20), seed + 1)
    asyncio.run(run(Endpoint(url), warm_up, Load(concurrency=3)))  # what is slow once is over
    known = wait_for_workers(one.log)
    assert one.process is not None
    meter = Meter(url, one.process.pid, known, seed)
    idle = meter.idle()
    alone: list[Spent] = []
    again: list[tuple[Spent, list[Sample]]] = []
    for length in LENGTHS:
        longer = meter.prompts([length + MORE] * EACH)
        alone.append(meter.one_by_one([prompt[:length] for prompt in longer], SHORT_ANSWER)[0])
        alone.append(meter.one_by_one(longer, SHORT_ANSWER)[0])
        again.append(meter.one_by_one(longer, 1))
    spent, long = meter.one_by_one(meter.prompts(LENGTHS), LONG_ANSWER)
    alone += [spent, *(spent for spent, _ in again)]
    model = fit_steps([each.steps for each in alone])
    pause = fit_pause(model, long)
    background, request, token = fit_host(idle, [each.with_pauses(pause) for each in alone])
    model = model._replace(base_ms=model.base_ms + pause)
    tokens = known[0].pages * PAGE_TOKENS
    return model._asdict() | {
        "overhead_ms": fit_around(again), "request_cpu_ms": request, "token_cpu_ms": token,
        "background_cores": background, "kv_bytes": kv_mib * 2**20 // tokens, "kv_tokens": tokens,
        "max_batch_tokens": BATCH_TOKENS, "max_running": RUNNING,
    }  # fmt: skip


def handed_over(one: Server, url: str, seed: int) -> dict[int, tuple[Spent, list[Sample]]]:
    """Prompts that nobody has computed, by length, one by one, of a cluster that hands every one over.

    Raises ConnectionError, httpx.HTTPError.
    """
    assert one.process is not None
    meter = Meter(url, one.process.pid, wait_for_workers(one.log), seed)
    meter.one_by_one(meter.prompts(LENGTHS), SHORT_ANSWER)  # what is slow once is over
    return {length: meter.one_by_one(meter.prompts([length] * 2 * EACH), 1) for length in LENGTHS}


class Random:
    """Independent prompts at random times, real and simulated."""

    def __init__(self, system: str, slots: int, seed: int, prompts: int = RANDOM) -> None:
        """system: its name in `benchmarks.systems`, of which the numbers of workers are read. slots: cores.

        Raises ValueError.
        """
        if (form := TANDEM.fullmatch(system)) is None:
            raise ValueError(f"system is {system}; a cluster of Tandem's is needed")
        self._prefill, self._decode, self._slots = int(form[1]), int(form[2]), slots
        self._load = Load(rate=RATE, seed=seed)
        self._asked = make("random", replace(MIXED, requests=prompts), seed)

    def play(self, one: Server, url: str) -> tuple[float, float]:
        """What all steps took, seconds, and the TTFT, milliseconds, as `middle`. Raises as `fit`."""
        pages = Pages([each.metrics for each in wait_for_workers(one.log)])
        before = pages.read()
        samples = asyncio.run(run(Endpoint(url), self._asked, self._load)).samples
        if failed := sorted({each.error for each in samples if each.error}):
            raise ValueError(f"of {len(samples)} random prompts some failed: {', '.join(failed)}")
        steps = sum(now.since(old).seconds for old, now in zip(before, pages.read(), strict=True))
        return steps, middle([ttft(each) * 1e3 for each in samples])

    def predict(self, machine: Machine) -> tuple[float, float]:
        """The same, by simulation."""
        basis = simulated.Setting(
            self._prefill, self._decode, machine, block_tokens=BLOCK_TOKENS, pool=True, slots=self._slots
        )
        asked = zip(self._load.arrivals(self._asked), self._asked, strict=True)
        replay = Replay(basis, CostPolicy(), [_arrival(number, *each) for number, each in enumerate(asked)])
        replay.run()
        steps = sum(worker.engine.busy_s for worker in (*replay.prefill, *replay.decode))
        return steps, middle([flight.ttft_s * 1e3 for flight in replay.flights])

    def fit(self, machine: Machine, steps_s: float, ttft_ms: float) -> Machine:
        """With crowding and contention, by what was measured."""
        crowding = fit_by_simulation(lambda value: self.predict(replace(machine, crowding=value))[0], steps_s)
        machine = replace(machine, crowding=crowding)
        contention = fit_by_simulation(lambda value: self.predict(replace(machine, contention=value))[1], ttft_ms)
        return replace(machine, contention=contention)


def _arrival(number: int, at: float, conversation: Conversation) -> Arrival:
    (turn,) = conversation.turns
    whole = range(len(turn.prompt) // BLOCK_TOKENS)
    # No two prompts begin alike.
    names = tuple(number.to_bytes(8, "big") + place.to_bytes(8, "big") for place in whole)
    return Arrival(at, len(turn.prompt), turn.max_tokens, names)


def cores() -> int:
    """That all processes share."""
    return len(os.sched_getaffinity(0))


def fit(system: str, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """Starts the cluster, and one that hands every prompt over; fields of `router.simulation.setting.Machine`.

    setting: with `kv_mib`. folder: for logs. Raises ValueError, ConnectionError, StartError, httpx.HTTPError.
    """
    load, topology = Random(system, cores(), seed), "-".join(system.split("-")[:2])
    one: Server = server(system, setting, Peers(), folder)
    other: Server = server(f"{topology}-{ALWAYS_HANDS_OVER}", setting, Peers(), folder)
    with one.running() as url:
        found = measure(one, url, setting.kv_mib, seed)
        measured = load.play(one, url)
    with other.running() as url:
        cold = handed_over(other, url, seed)
    moved = fit_hand_over(found["overhead_ms"], cold, found["kv_bytes"])
    found |= dict(zip(("hand_over_ms", "link_bytes_per_ms"), moved, strict=True))
    return asdict(load.fit(Machine(**found), *measured))


def main(
    path: Path,
    system: Annotated[str, typer.Option(help="see benchmarks.compare")] = "tandem-4p2d",
    model: Annotated[str, typer.Option(help="see benchmarks.compare")] = "demo",
    kv_mib: Annotated[int, typer.Option(min=1, help="KV memory of each worker")] = 8,
    seed: int = 1,
) -> None:
    """Starts the cluster, measures it, writes the file."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this, the clusters end too
    folder = Path(tempfile.mkdtemp(prefix="tandem-fit-"))
    try:
        found = fit(system, Setting(checkpoint(model, None), kv_mib=kv_mib), seed, folder)
    except (ValueError, ConnectionError, StartError, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
