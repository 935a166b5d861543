"""What clients see when a process is killed, stopped, ended or restarted, or its network fails: `docs/faults.md`.

Real processes and real NIXL: a router, two prefill and two decode workers with a small random checkpoint, each worker
in a network namespace of its own where this machine permits. Each cell sets a number of streams going, strikes when
they are in the phase that the cell names, puts things right, and reads what came of it. The answers are compared with
those to the same prompts afterwards, when nothing is wrong.

    python -m benchmarks.faults --out docs/faults.md [--only TEXT]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import platform
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from openai import AsyncOpenAI

from benchmarks.fault_network import Network, network
from tandem.obs import FIRST_TOKEN_SECONDS
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
ROLES = ("prefill", "decode")
FAULTS = ("SIGKILL", "SIGSTOP", "SIGTERM", "restart", "partition", "slow link")
PHASES = ("idle", "mid-prefill", "mid-transfer", "mid-decode")
ROUTER_FAULTS = ("SIGKILL", "SIGTERM", "restart")
STREAMS = 6
PROMPT_TOKENS = 700
OUTPUT_TOKENS = 150
STOPPED_S = 20.0
NETWORK_S = 5.0
"""How long a pair is cut or a link is slow."""
REPLACED_S = 1.0
"""Seconds until a supervisor starts what was killed; none for a restart on the same address."""
ANSWER_S = 90.0
"""A stream that has no end by then is lost."""
SETTLE_S = 20.0
POLL_S = 0.02
TARGET_S = 5.0


@dataclass(frozen=True)
class Cell:
    """One fault of one role in one phase."""

    role: str
    fault: str
    phase: str

    @property
    def victim(self) -> str:
        """The process that is struck."""
        return "router" if self.role == "router" else f"{self.role}-0"

    def __str__(self) -> str:
        return f"{self.role}, {self.fault}, {self.phase}"


@dataclass
class Outcome:
    """What came of a cell."""

    cell: Cell
    skipped: str = ""
    reached: bool = False
    """Whether the fault came in the cell's phase; else the streams had ended before."""
    answered: int = 0
    errors: list[str] = field(default_factory=list)
    """What clients were told."""
    lost: int = 0
    """Streams without an end, or with a clean end too early, or with another text."""
    service_s: float = 0.0
    """From the replacement's first answer, or the end of the fault, until all workers serve again."""
    leaked: list[str] = field(default_factory=list)

    @property
    def leaked_bytes(self) -> int:
        """Bytes that leaks name, one for each that names none."""
        return sum(int(found[1]) if (found := re.search(r"(\d+) bytes", line)) else 1 for line in self.leaked)


def cells() -> list[Cell]:
    """The matrix."""
    made = [Cell(role, fault, phase) for role in ROLES for fault in FAULTS for phase in PHASES]
    return made + [Cell("router", fault, "mid-decode") for fault in ROUTER_FAULTS]


class Bench:
    """One running cluster on which cells are played one after the other."""

    def __init__(self, running: Cluster, net: Network | str, openai: AsyncOpenAI) -> None:
        self._running, self._net, self._openai = running, net, openai
        self._seeds = 0

    # Streams --------------------------------------------------------------------------------------------------------

    async def _stream(self, seed: int) -> tuple[str, str]:
        """One answer's text, or why there is none; ("", "lost: ...") for what no client could notice."""
        prompt = [(seed * 7919 + position * (17 + seed % 11)) % 250 for position in range(PROMPT_TOKENS)]
        text, tokens = "", 0
        finish: str | None = None
        try:
            async with asyncio.timeout(ANSWER_S):
                stream = await self._openai.completions.create(
                    model="llama",
                    prompt=prompt,
                    max_tokens=OUTPUT_TOKENS,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        text += choice.text
                        if choice.finish_reason is not None:
                            finish = choice.finish_reason
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        except TimeoutError:
            return "", f"lost: no end within {ANSWER_S:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, the client sees it
            return "", f"{type(error).__name__}: {error}"
        if finish != "length" or tokens != OUTPUT_TOKENS:
            return "", f"lost: a clean end after {tokens} of {OUTPUT_TOKENS} tokens"
        return text, ""

    async def _reached(self, cell: Cell, before: tuple[float, float], streams: Sequence[asyncio.Task[Any]]) -> bool:
        """Waits until the streams are in the cell's phase; False when they ended before. before: the counters then."""
        while cell.phase != "idle" and not all(task.done() for task in streams):
            firsts, moved = await self._counters()
            if cell.phase == "mid-decode":
                reached = firsts >= before[0] + STREAMS
            else:
                reached = await self._open_tickets() and (cell.phase == "mid-prefill" or moved > before[1])
            if reached:
                return True
            await asyncio.sleep(POLL_S)
        return cell.phase == "idle"

    async def _counters(self) -> tuple[float, float]:
        """First tokens that clients were sent, and KV bytes moved."""
        names = FIRST_TOKEN_SECONDS + "_count", "tandem_kv_moved_bytes_total"
        return await _read(self._running, names[0]), await _read(self._running, names[1])

    async def _open_tickets(self) -> bool:
        senders = [process for name, process in self._running.workers.items() if name.startswith("prefill")]
        held = await asyncio.gather(*(_audit(self._running, process) for process in senders))
        return any("ticket" in line for lines in held for line in lines)

    # One cell -------------------------------------------------------------------------------------------------------

    async def play(self, cell: Cell) -> Outcome:
        """Streams, fault, end of the fault, and what came of it."""
        outcome = Outcome(cell)
        if cell.fault in ("partition", "slow link") and isinstance(self._net, str):
            outcome.skipped = self._net
            return outcome
        seeds = [self._seeds + number for number in range(STREAMS)]
        self._seeds += STREAMS
        before = await self._counters()
        streams = [] if cell.phase == "idle" else [asyncio.create_task(self._stream(seed)) for seed in seeds]
        outcome.reached = await self._reached(cell, before, streams)

        def struck() -> None:
            # An idle cluster is struck first and asked then.
            streams.extend(asyncio.create_task(self._stream(seed)) for seed in seeds if cell.phase == "idle")

        outcome.service_s = await self._strike(cell, struck)
        results = await asyncio.gather(*streams)
        again = await asyncio.gather(*(self._stream(seed) for seed in seeds))
        for (text, error), (right, problem) in zip(results, again, strict=True):
            if problem:
                outcome.errors.append(f"afterwards: {problem}")
            elif error.startswith("lost") or (not error and text != right):
                outcome.lost += 1
                outcome.errors.append(error or "another text than without the fault")
            elif error:
                outcome.errors.append(error)
            else:
                outcome.answered += 1
        outcome.leaked = await self._leaks()
        return outcome

    async def _strike(self, cell: Cell, struck: Callable[[], object]) -> float:
        """The fault and its end; seconds from then until everything serves."""
        victim = self._running.router if cell.role == "router" else self._running.workers[cell.victim]
        if cell.fault in ("SIGKILL", "SIGTERM", "restart"):
            await self._replace(cell, victim, struck)
        elif cell.fault == "SIGSTOP":
            victim.signal(signal.SIGSTOP)
            struck()
            await asyncio.sleep(STOPPED_S)
            victim.signal(signal.SIGCONT)
        else:
            assert isinstance(self._net, Network)
            cut = cell.fault == "partition"
            if cut:
                self._net.cut("prefill-0", "decode-0")
            else:
                self._net.slow(cell.victim)
            struck()
            await asyncio.sleep(NETWORK_S)
            if cut:
                self._net.mend("prefill-0", "decode-0")
            else:
                self._net.fast(cell.victim)
        begun = time.monotonic()
        await _until(self._serving, SETTLE_S)
        return time.monotonic() - begun

    async def _replace(self, cell: Cell, victim: Process, struck: Callable[[], object]) -> None:
        """Ends a process and starts it again; returns when it answers."""
        assert victim.popen is not None
        victim.signal(signal.SIGTERM if cell.fault == "SIGTERM" else signal.SIGKILL)
        struck()
        await asyncio.to_thread(victim.popen.wait, 60)
        if cell.fault != "restart":
            await asyncio.sleep(REPLACED_S)
        victim.start()
        answers = self._router_answers if cell.role == "router" else lambda: self._running.answers(victim)
        await _until(answers, 60.0)

    def _router_answers(self) -> bool:
        return bool(self._running.get("/health"))

    def _serving(self) -> bool:
        """Whether the router sees every worker, and is ready."""
        return "ready" in self._running.get("/ready") and self._running.complete()

    async def _leaks(self) -> list[str]:
        """What is still held some time after everything is over."""
        running, deadline = self._running, time.monotonic() + SETTLE_S
        while True:
            held = [f"{name}: {line}" for name in WORKERS for line in await _audit(running, running.workers[name])]
            if not held or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.2)


async def _read(running: Cluster, name: str) -> float:
    """A counter of the router's; 0 while it does not answer, or has none yet."""
    with contextlib.suppress(OSError, AssertionError):
        return await asyncio.to_thread(running.metric, name)
    return 0.0


async def _audit(running: Cluster, process: Process) -> list[str]:
    """What a worker holds; a word of its own for one that does not answer."""
    try:
        return await asyncio.to_thread(running.audit, process)
    except grpc.RpcError:
        return ["it does not answer"]


async def _until(condition: Callable[[], bool], most_s: float) -> None:
    """Waits for a condition, at most so long: the figures then say how long it was."""
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, grpc.RpcError):
            if await asyncio.to_thread(condition):
                return
        await asyncio.sleep(POLL_S)


@contextlib.contextmanager
def running_cluster(folder: Path, namespaces: bool = True) -> Iterator[tuple[Cluster, Network | str]]:
    """The cluster that cells are played on, and its network."""
    model = make_checkpoint(folder / "llama", CheckpointSpec(family="llama", seed=1))
    arguments = ["--kv-mib", "32", "--max-batch-tokens", "32", "--drain-s", "10"]
    with contextlib.ExitStack() as stack:
        net: Network | str = "it was not asked for"
        if namespaces:
            net = stack.enter_context(network(WORKERS))
        hosts = net.hosts if isinstance(net, Network) else {}
        decode = ["--local-prefill-tokens", "0", "--span-tokens", "64"]
        policy = ["--policy", "round_robin"]
        secret = uuid.uuid4().hex
        yield stack.enter_context(cluster(model, folder, 2, 2, arguments, decode, policy, secret, hosts)), net


async def play(running: Cluster, net: Network | str, chosen: Sequence[Cell]) -> list[Outcome]:
    """Plays cells one after the other."""
    outcomes = []
    async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=ANSWER_S) as openai:
        bench = Bench(running, net, openai)
        for cell in chosen:
            outcome = await bench.play(cell)
            outcomes.append(outcome)
            sys.stderr.write(f"{cell}: {row(outcome)}\n")
            await _until(running.complete, 60.0)
    return outcomes


def row(outcome: Outcome) -> str:
    """A line of the table."""
    cell = outcome.cell
    head = f"| {cell.role} | {cell.fault} | {cell.phase} "
    if outcome.skipped:
        return head + f"| not run: {outcome.skipped} | | | |"
    told = "; ".join(sorted({error[:80].replace("|", "/") for error in outcome.errors})) or "none"
    head += "" if outcome.reached else "(not met: the streams had ended) "
    figures = f"{outcome.lost} | {outcome.service_s:.1f} | {outcome.leaked_bytes} |"
    return head + f"| {len(outcome.errors)} of {STREAMS} ({told}) | {figures}"


def page(outcomes: Sequence[Outcome]) -> str:
    """`docs/faults.md`."""
    played = [outcome for outcome in outcomes if not outcome.skipped]
    missed = [str(o.cell) for o in played if o.lost or o.leaked or o.service_s > TARGET_S]
    seen = [str(o.cell) for o in played if o.errors and o.cell.role != "router"]
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return "\n".join(
        (
            "# What faults cost",
            "",
            "Generated by `make faults` (`benchmarks/faults.py`); do not edit. Real processes, real gRPC and NIXL "
            "over TCP: a router, two prefill and two decode workers, each in a network namespace of its own. In each "
            f"cell {STREAMS} streams of {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens run (idle: begin "
            "right after the fault). SIGSTOP lasts 20 s, a cut or a slow link 5 s; what was killed is started again "
            "after 1 s, a restart follows at once on the same address.",
            "",
            "*Errors*: streams whose client was told of an error. *Lost*: streams without an end, with a clean end too "
            "early, or with another text than the same prompt has without a fault. *Service*: seconds from the "
            "replacement's first answer, or the end of the fault, until the router serves with every worker. *Leaked*: "
            "bytes held when all was over.",
            "",
            f"{today}, {platform.machine()}, Python {platform.python_version()}: "
            f"{len(played)} of {len(outcomes)} cells played; targets missed in: {', '.join(missed) or 'none'}; "
            f"faults of one worker seen by clients: {', '.join(seen) or 'none'}.",
            "",
            "| role | fault | phase | errors | lost | service, s | leaked, bytes |",
            "|---|---|---|---|---|---|---|",
            *map(row, outcomes),
            "",
        )
    )


def main() -> int:
    """Plays the matrix and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("docs/faults.md"))
    parser.add_argument("--only", default="", help="cells whose name contains this, such as 'decode, SIGKILL'")
    arguments = parser.parse_args()
    chosen = [cell for cell in cells() if arguments.only in str(cell)]
    with tempfile.TemporaryDirectory() as folder, running_cluster(Path(folder)) as (running, net):
        outcomes = asyncio.run(play(running, net, chosen))
    arguments.out.write_text(page(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
