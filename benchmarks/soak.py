"""Mixed load for a long while with a fault every half minute: what clients are told, what is lost, and what grows.

Two routers, two prefill and two decode workers, real processes and NIXL. One of each role is spared: it is stopped
for some seconds now and then, as all are, but never ended, so that its memory can be judged; the others are killed,
ended and restarted in turns. Half of the clients use either router. An error counts as a router's own when that
router was struck while the request ran; every other one is unexplained, and so is whatever is still held at the end.
As many requests must have ended, in whatever way, as were begun.

    python -m benchmarks.soak [--minutes 30] [--mix even] [--policy cost] [--rate 2] [--seed 0]

What a process's slope shows, `benchmarks/soak_watch.py` says. Each spared process must have one, which takes some
minutes; one of those that are struck may live too short.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

import grpc

from benchmarks.soak_clients import MIXES, Clients, End
from benchmarks.soak_watch import FLAT_MIB_MIN, GROWS, NOT_JUDGED, NOT_SHOWN, Watch, after, slope, verdict
from tandem.obs import REQUESTS_QUEUED, REQUESTS_RUNNING
from tandem.ports import free_ports
from tandem.testing.cluster import Cluster, Process, cluster

log = logging.getLogger(__name__)

MODEL = Path(__file__).parents[1] / "tandem" / "demo" / "model"
WORKERS = 2
SPARED = ("router-0", "prefill-0", "decode-0")
FAULTS = ("SIGKILL", "SIGSTOP", "SIGTERM", "restart")
STOPPED_S = 5.0
REPLACED_S = 1.0
MOST_OPEN = 48
"""Requests at once; more are not begun, so that a slow machine is not buried."""
QUIET_S = 20.0
WARM_AT_ONCE = 8
"""Of the requests before the first fault: batches as large as will come make the buffers that they need."""
WARM_SHARE = 1 / 3
"""Of the time with faults, not judged."""
FIGURES = ("rss", "pss", "own", "descriptors", "threads")
SMALL_STORES = (
    "--explain-requests", "64", "--ladder-blocks", "256", "--index-max-blocks", "4096", "--turn-cache-mib", "1"
)  # fmt: skip
SMALL_GRAMMARS = ("--grammar-cache-mib", "2")
"""Bounded stores are full within the warm-up, so that what still grows afterwards is none of them."""


@dataclass(frozen=True)
class Fault:
    """Of one process, as `benchmarks/faults.py` names them; on the clock `time.monotonic`."""

    name: str
    kind: str
    begun: float
    ended: float


@dataclass
class Report:
    """What came of a soak."""

    ends: list[End] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    """What is still held after all clients have gone."""
    grown: list[tuple[str, float, str, list[str]]] = field(default_factory=list)
    """Name, minutes of its longest life, memory at its end, and a slope for each figure."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """What each process's memory shows, as `benchmarks.soak_watch.verdict` says."""
    begun: int = 0
    """Requests; each must be among the ends."""
    skipped: int = 0
    late: list[str] = field(default_factory=list)
    """Faults after which not everybody served again within `tandem.testing.cluster.START_S`."""

    def unexplained(self) -> list[End]:
        """Errors and losses that no fault explains."""
        return [end for end in self.ends if end.outcome == "lost" or (end.outcome == "error" and not self.reason(end))]

    def judged(self, as_what: str) -> list[str]:
        """The processes of which this is the verdict."""
        return [name for name, found in self.verdicts.items() if found == as_what]

    def failed(self) -> bool:
        """Whether anything is unexplained, vanished, held, late, grows, or was to be judged and was not."""
        unjudged = set(SPARED) - {name for name, found in self.verdicts.items() if found != NOT_JUDGED}
        wrong = self.unexplained() or self.held or self.late or self.judged(GROWS) or unjudged
        return bool(wrong) or len(self.ends) != self.begun

    def reason(self, end: End) -> str:
        """What a request's error is owed to; empty for nothing. A stop is no reason for one."""
        during = [f for f in self.faults if f.kind != "SIGSTOP" and f.begun <= end.ended and end.begun <= f.ended]
        for fault in during:
            if fault.name == f"router-{end.door}":
                return f"router {fault.kind}"
        killed = [fault for fault in during if fault.name.startswith("decode") and fault.kind != "SIGTERM"]
        return "two decode workers killed" if len(killed) > 1 and "worker_lost" in end.cause else ""

    def text(self) -> str:
        """All of it, as Markdown."""
        kinds = Counter(f"{fault.name} {fault.kind}" for fault in self.faults)
        outcomes = Counter(end.outcome for end in self.ends)
        errors = [end for end in self.ends if end.outcome == "error" and self.reason(end)]
        told = Counter(f"{self.reason(end)}: {end.cause}" for end in errors)
        wrong = Counter(f"{end.kind}: {end.outcome}: {end.cause}" for end in self.unexplained())
        lines = [
            f"{self.begun} requests ({self.skipped} more not begun), of which {len(self.ends)} ended: "
            f"{dict(outcomes)}; {len(self.faults)} faults: {dict(kinds)}",
            f"- errors that a fault explains: {dict(told) or 'none'}",
            f"- unexplained: {dict(wrong) or 'none'}",
            f"- not everybody back in time after: {', '.join(self.late) or 'none'}",
            f"- held at the end: {'; '.join(self.held) or 'nothing'}",
            f"- grows, by more than {FLAT_MIB_MIN} MiB/min: {', '.join(self.judged(GROWS)) or 'none'}",
            f"- neither that nor flat is shown: {', '.join(self.judged(NOT_SHOWN)) or 'none'}",
            f"- not judged, lived too short: {', '.join(self.judged(NOT_JUDGED)) or 'none'}",
            "",
            f"Growth a minute after the first {WARM_SHARE:.0%} of it, memory in MiB; *own* is what no file backs.",
            "",
            "| process | minutes | rss / pss / own at the end | rss | pss | own | descriptors | threads |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [f"| {name} | {life:.0f} | {end} | {' | '.join(slopes)} |" for name, life, end, slopes in self.grown]
        return "\n".join(lines)


class Soak:
    """One cluster under load and faults."""

    def __init__(self, views: Sequence[Cluster], mix: str, seed: int, warm_requests: int = 0) -> None:
        self._views, self._warm_requests = views, warm_requests
        self._processes = [*(view.router for view in views), *views[0].workers.values()]
        self._clients = Clients([view.url for view in views], MODEL.name, mix, seed)
        self._source = random.Random(f"faults {seed}")
        self.watch = Watch(self._processes)
        self.report = Report()

    async def run(self, seconds: float, fault_s: float, rate: float) -> None:
        """What stores and buffers fill with, then load, faults and samples for so long, then quiet."""
        await self._warm()
        log.info("the clock starts after %s", Counter(end.outcome for end in self.report.ends))
        watching = asyncio.create_task(self.watch.run())
        until = time.monotonic() + seconds
        disturbing = asyncio.create_task(self._disturb(until, fault_s))
        try:
            await self._load(until, rate)
            await disturbing
            self.report.held = await self._quiet()
        finally:
            watching.cancel()
            disturbing.cancel()
            await self._clients.close()
        self._judge(seconds * WARM_SHARE)

    def write(self, path: Path) -> None:
        """All samples, ends and faults, as JSON."""
        lives = {f"{name} {pid}": [asdict(sample) for sample in life] for (name, pid), life in self.watch.lives.items()}
        ends, faults = map(asdict, self.report.ends), map(asdict, self.report.faults)
        path.write_text(json.dumps({"ends": list(ends), "faults": list(faults), "lives": lives}))

    async def _warm(self) -> None:
        if not self._warm_requests:
            return
        await self._clients.fill_word_caches()
        left = iter(range(self._warm_requests))

        async def some() -> None:
            for _ in left:
                await self._one()

        await asyncio.gather(*(some() for _ in range(WARM_AT_ONCE)))

    async def _load(self, until: float, rate: float) -> None:
        """Requests at random moments, `rate` a second, whatever became of those before."""
        open_now: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            await asyncio.sleep(self._source.expovariate(rate))
            if len(open_now) >= MOST_OPEN:
                self.report.skipped += 1
                continue
            task = asyncio.create_task(self._one())
            open_now.add(task)
            task.add_done_callback(open_now.discard)
        await asyncio.gather(*open_now)

    async def _one(self) -> None:
        self.report.begun += 1
        end = await self._clients.ask()
        if end.outcome == "lost":
            log.warning("lost: %s: %s", end.kind, end.cause)
        self.report.ends.append(end)

    async def _disturb(self, until: float, fault_s: float) -> None:
        """Strikes another process each time, and comes round to each kind."""
        struck = [process for process in self._processes if process.name not in SPARED]
        self._source.shuffle(struck)
        plan = [(process, FAULTS[(at + turn) % len(FAULTS)]) for turn in range(4) for at, process in enumerate(struck)]
        spared = [process for process in self._processes if process.name in SPARED]
        for turn, process in enumerate(spared):
            plan.insert((turn + 1) * len(plan) // len(spared), (process, "SIGSTOP"))
        for process, kind in cycle(plan):
            if time.monotonic() + fault_s > until:
                return
            next_at = time.monotonic() + fault_s
            begun = time.monotonic()
            await self._strike(process, kind)
            self.report.faults.append(Fault(process.name, kind, begun, time.monotonic()))
            log.info("%s %s: %s", process.name, kind, Counter(end.outcome for end in self.report.ends))
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async def _strike(self, process: Process, kind: str) -> None:
        """A fault and its end; returns when every router sees every worker again."""
        if kind == "SIGSTOP":
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            process.signal(signal.SIGCONT)
        else:
            assert process.popen is not None
            process.signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            await asyncio.to_thread(process.popen.wait, 60)
            if kind != "restart":
                await asyncio.sleep(REPLACED_S)
            process.start()
        try:
            for view in self._views:
                await asyncio.to_thread(view.wait_ready)
        except AssertionError as error:
            self.report.late.append(f"{process.name} {kind}")
            log.warning("after %s of %s: %s", kind, process.name, error)

    async def _quiet(self) -> list[str]:
        """What is still held some time after the last client has gone."""
        deadline = time.monotonic() + QUIET_S
        while True:
            held = await asyncio.to_thread(self._holds)
            if not held or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.2)

    def _holds(self) -> list[str]:
        held = [f"{name}: {line}" for name, worker in self._views[0].workers.items() for line in self._audit(worker)]
        for view in self._views:
            counts = {name: view.metric(name) for name in (REQUESTS_RUNNING, REQUESTS_QUEUED)}
            held += [f"{view.router.name}: {name} {count:g}" for name, count in counts.items() if count]
        return held

    def _audit(self, worker: Process) -> list[str]:
        try:
            return self._views[0].audit(worker)
        except grpc.RpcError:
            return ["it does not answer"]

    def _judge(self, warm_s: float) -> None:
        # A spared process that nobody ever saw alive is named too.
        self.report.verdicts = dict.fromkeys(SPARED, NOT_JUDGED)
        for name, life in self.watch.longest().items():
            warm = after(life, warm_s)
            slopes = {figure: slope(warm, figure) for figure in FIGURES}
            minutes, last = (life[-1].at_s - life[0].at_s) / 60, life[-1].figures
            end = f"{last['rss']:.0f} / {last['pss']:.0f} / {last['own']:.0f}"
            self.report.grown.append((name, minutes, end, [str(slopes[figure] or "-") for figure in FIGURES]))
            self.report.verdicts[name] = verdict([slopes[figure] for figure in ("rss", "own")])


@contextlib.contextmanager
def running_cluster(folder: Path, policy: str, workers: int = WORKERS) -> Iterator[list[Cluster]]:
    """The same workers as each of two routers sees them."""
    http, control = free_ports(2)
    token, more = uuid.uuid4().hex, ["--policy", policy, "--drain-s", "10", *SMALL_STORES]
    arguments = ["router", "--model", str(MODEL), "--port", str(http), "--control-port", str(control), *more]
    other = Process("router-1", arguments, http, folder / "router-1.log", {"TANDEM_TOKEN": token})
    settings = ["--router", f"127.0.0.1:{control}", "--dtype", "float32", "--kv-mib", "24", "--drain-s", "10"]
    settings += ["--max-batch-tokens", "128", "--slab-mib", "8"]
    other.start()
    try:
        with cluster(MODEL, folder, workers, workers, settings, SMALL_GRAMMARS, more, token) as first:
            first.router.name = "router-0"
            second = Cluster(other, first.workers, token=token)
            second.wait_ready()
            yield [first, second]
    finally:
        other.signal(signal.SIGTERM)
        assert other.popen is not None
        other.popen.wait(30)


def main() -> int:
    """Prints the report; 1 for what `Report.failed` names."""
    parser = argparse.ArgumentParser(description="Mixed load, faults, and what grows")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--fault-s", type=float, default=30.0, help="seconds from a fault to the next")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--mix", choices=sorted(MIXES), default="even")
    parser.add_argument("--policy", default="cost", help="of the routers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-requests", type=int, default=1000, help="before the first fault, eight at a time")
    parser.add_argument("--raw", type=Path, help="write all samples, ends and faults to this JSON file")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, running_cluster(Path(folder), given.policy) as views:
        soak = Soak(views, given.mix, given.seed, given.warm_requests)
        asyncio.run(soak.run(given.minutes * 60, given.fault_s, given.rate))
        report, heading = soak.report, f"mix {given.mix}, policy {given.policy}, seed {given.seed}"
        sys.stdout.write(f"{given.minutes:g} min, {heading}: {report.text()}\n")
        if given.raw is not None:
            soak.write(given.raw)
    return 1 if report.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
