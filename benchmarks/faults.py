"""What clients see when a process is killed, stopped, ended or restarted, or its network fails: `docs/faults.md`.

Real processes and real NIXL: a router, two prefill and two decode workers with a small random checkpoint, each worker
in a network namespace of its own where this machine permits. Each cell asks its prompts without a fault, sets them
going again under another salt, strikes when the victim is in the phase that the cell names, puts things right, and
reads what came of it; `benchmarks/fault_cells.py` says what counts.

    python -m benchmarks.faults --out docs/faults.md [--only TEXT]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from openai import AsyncOpenAI

from benchmarks.fault_cells import (
    LOST,
    NETWORK_S,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REPLACED_S,
    STOPPED_S,
    STREAMS,
    Cell,
    Outcome,
    Stream,
    cells,
    page,
    row,
)
from benchmarks.fault_network import Network, network
from benchmarks.fault_phases import audit, first_tokens, met, moved
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
TRIES = 3
"""Times that a cell is played until its fault meets the victim in its phase."""
ANSWER_S = 90.0
"""A stream that has no end by then is lost."""
SETTLE_S = 20.0
POLL_S = 0.02


class Bench:
    """One running cluster on which cells are played one after the other."""

    def __init__(self, running: Cluster, net: Network | str, openai: AsyncOpenAI) -> None:
        self._running, self._net, self._openai = running, net, openai
        self._seeds = 0

    # Streams --------------------------------------------------------------------------------------------------------

    async def _stream(self, seed: int, salt: str) -> Stream:
        """One answer's text, or why there is none."""
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
                    extra_body={"ignore_eos": True, "cache_salt": salt},
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        text += choice.text
                        if choice.finish_reason is not None:
                            finish = choice.finish_reason
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        except TimeoutError:
            return Stream(problem=f"{LOST}no end within {ANSWER_S:g} s")
        except Exception as error:  # noqa: BLE001 - whatever it is, the client sees it
            return Stream(problem=f"{type(error).__name__}: {error}")
        if finish != "length" or tokens != OUTPUT_TOKENS:
            return Stream(problem=f"{LOST}a clean end after {tokens} of {OUTPUT_TOKENS} tokens")
        return Stream(text)

    def _streams(self, seeds: Sequence[int], salt: str) -> list[asyncio.Task[Stream]]:
        return [asyncio.create_task(self._stream(seed, salt)) for seed in seeds]

    # One cell -------------------------------------------------------------------------------------------------------

    async def play(self, cell: Cell) -> Outcome:
        """The cell, more than once if its fault did not meet the phase."""
        outcome = Outcome(cell)
        if cell.network and isinstance(self._net, str):
            outcome.skipped = self._net
            return outcome
        for _ in range(TRIES):
            outcome.join(await self._once(cell))
            if outcome.reached:
                break
        return outcome

    async def _once(self, cell: Cell) -> Outcome:
        """Streams without a fault, streams with one, the end of the fault, and the same streams again."""
        outcome, running = Outcome(cell), self._running
        seeds = range(self._seeds, self._seeds + STREAMS)
        self._seeds += STREAMS
        before = await moved(running)
        right = await asyncio.gather(*self._streams(seeds, "without a fault"))
        after = await moved(running)
        used = {pair for pair, size in after.items() if size > before.get(pair, 0.0)}
        begun = await first_tokens(running) + STREAMS
        streams = [] if cell.phase == "idle" else self._streams(seeds, "struck")
        peers = await self._peers(cell, begun, streams)
        pair = await self._pair(cell, used, peers) if cell.fault == "partition" else None
        outcome.reached = peers is not None and (cell.fault != "partition" or pair is not None)

        def struck() -> None:
            # An idle cluster is struck first and asked then.
            streams.extend(self._streams(seeds, "struck") if cell.phase == "idle" else [])

        outcome.service_s = await self._strike(cell, pair or ("prefill-0", "decode-0"), struck)
        during = await asyncio.gather(*streams)
        outcome.judge(right, during, await asyncio.gather(*self._streams(seeds, "struck")))
        if cell.role == "router" and cell.fault != "SIGTERM" and not outcome.errors:
            outcome.reached = False  # no stream was open any more
        outcome.leaked = await self._leaks()
        return outcome

    async def _peers(self, cell: Cell, begun: float, streams: Sequence[asyncio.Task[Any]]) -> list[str] | None:
        """Waits until the victim is in the phase: its peers then; None when the streams ended before."""
        if cell.phase == "idle":
            return []
        victim = self._victim(cell)
        while not all(task.done() for task in streams):
            if (peers := await met(self._running, victim, cell.phase, begun)) is not None:
                return peers
        return None

    async def _pair(self, cell: Cell, used: set[tuple[str, str]], peers: list[str] | None) -> tuple[str, str] | None:
        """Names of the victim and of the worker it is cut off from: one that it moves KV to or from."""
        names = {}
        for name, process in self._running.workers.items():
            names[await asyncio.to_thread(self._running.incarnation, process)] = name
        pairs = {(names.get(sender, ""), names.get(receiver, "")) for sender, receiver in used}
        others = {one if other == cell.victim else other for one, other in pairs if cell.victim in (one, other)}
        busy = {names.get(peer, "") for peer in peers or ()}
        found = sorted((others & busy) if busy else others)
        return (cell.victim, found[0]) if found else None

    def _victim(self, cell: Cell) -> Process:
        return self._running.router if cell.role == "router" else self._running.workers[cell.victim]

    async def _strike(self, cell: Cell, pair: tuple[str, str], struck: Callable[[], object]) -> float:
        """The fault and its end; seconds from then until everything serves."""
        victim = self._victim(cell)
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
                self._net.cut(*pair)
            else:
                self._net.slow(cell.victim)
            struck()
            await asyncio.sleep(NETWORK_S)
            if cut:
                self._net.mend(*pair)
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
            held = [f"{name}: {line}" for name in WORKERS for line in await audit(running, running.workers[name])]
            if not held or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.2)


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
