"""The hand-over of a prompt's KV between two processes, beside plain NIXL writes of the same sizes in the same run.

    python -m benchmarks.handover --tokens 2048 --layout qwen2-370m

hand-over: from asking for a prompt's KV to having it in the receiver's pages: messages, gathering, digests, writes,
copying, checking, scattering. raw: the writes alone, as many under way at once as a slab holds spans.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import report as reports
from benchmarks.handover_ends import FINGERPRINT, RAW_POLL_S, ROOT, Case, layout_of, make_engine
from kvtransfer.backends import choose
from kvtransfer.base import MIB, Identity, Landing
from kvtransfer.inbound import InboundSettings, PairClient
from kvtransfer.layout import SLAB_SPANS, cut, span_limit
from kvtransfer.manifest import digest
from kvtransfer.slab import SlabBudget, allocate_memory
from kvtransfer.transfer_thread import TransferThread
from tandem.cluster import Ticket, new_id
from tandem.config import DecodeConfig, PrefillConfig
from tandem.engine.sequence import Seq
from tandem.kv import Span
from tandem.types import SamplingParams
from tandem.worker.engine_thread import EngineThread
from tandem.worker.kv_sink import PageSink, Reservations


@dataclass
class Receiver:
    """The receiver's end, and the pipe to the sender's process."""

    case: Case
    incarnation: str
    sender: asyncio.subprocess.Process
    pair: PairClient
    peer: str
    engine: Any
    thread: EngineThread
    reservations: Reservations
    landing: Landing

    async def tell(self, command: dict[str, Any]) -> dict[str, Any]:
        """Sends the sender's process a command and waits for its answer."""
        assert self.sender.stdin is not None
        self.sender.stdin.write((json.dumps(command) + "\n").encode())
        await self.sender.stdin.drain()
        return await _answer(self.sender)

    async def hand_over(self) -> float:
        """One prompt into fresh pages; seconds. Raises RuntimeError when it failed."""
        prompt = self.case.prompt
        seq = Seq(
            seq_id=new_id(), tokens=[*prompt, 0], prompt_len=len(prompt) + 1, sampling=SamplingParams(max_tokens=1),
            root=ROOT.digest(), eos_ids=frozenset(),
        )  # fmt: skip
        layout = layout_of(self.case.layout)
        ticket = Ticket(new_id(), seq.seq_id, 0, self.peer, self.incarnation, layout.digest(), 30.0, 30.0)
        sink = PageSink(seq, self.engine, self.thread, self.reservations.reserve)
        started = time.perf_counter()
        result = await self.pair.fetch(ticket, prompt, "", "", 0, sink)
        seconds = time.perf_counter() - started
        await self.thread.call(self.engine.cancel, seq.seq_id)
        if result.error or sink.landed != len(prompt):
            raise RuntimeError(f"hand-over: {result.error or 'incomplete'}")
        return seconds

    async def cpu(self) -> tuple[float, float]:
        """CPU seconds that sender and receiver have used so far."""
        return float((await self.tell({"cpu": True}))["seconds"]), time.process_time()

    async def raw(self, sizes: list[int]) -> float:
        """The same bytes as plain writes; seconds at the sender, from the first to the end of the last."""
        stop = asyncio.Event()

        async def poll() -> None:
            while not stop.is_set():
                self.landing.poll()
                await asyncio.sleep(RAW_POLL_S)

        polling = asyncio.create_task(poll())
        answer = await self.tell({"raw": {"sizes": sizes, "slab": int(self.case.slab_mib * MIB), "depth": SLAB_SPANS}})
        stop.set()
        await polling
        return float(answer["seconds"])


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the sender's process has ended")
    return dict(json.loads(line))


async def _receiver(case: Case, stack: AsyncExitStack) -> Receiver:
    """Starts the sender's process and connects to it."""
    me, peer = new_id(), new_id()
    arguments = ["-m", "benchmarks.handover_ends", json.dumps(asdict(case)), peer]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=pipe, stdout=pipe)
    stack.push_async_callback(process.wait)
    assert process.stdin is not None
    stack.callback(process.stdin.close)
    engine, _ = make_engine(case, cached=False)
    loop = asyncio.get_running_loop()
    thread = EngineThread(engine, lambda output: None, lambda error: loop.stop())
    thread.start()
    stack.push_async_callback(thread.stop)
    transfers = TransferThread("receiving")
    transfers.start()
    stack.callback(transfers.close)
    backend = choose(case.transport).preferred
    address = f"127.0.0.1:{(await _answer(process))['port']}"
    settings = InboundSettings(slab_mib=case.slab_mib, span_tokens=case.span_tokens)
    pair = PairClient(
        Identity(me, engine.layout, FINGERPRINT), address, peer, backend, transfers, SlabBudget(1 << 32), settings
    )
    await pair.connect()
    stack.push_async_callback(pair.close)
    landing = backend.landing("raw-receiver", "raw-sender", int(case.slab_mib * MIB))
    stack.callback(landing.close)
    made = Receiver(case, me, process, pair, peer, engine, thread, Reservations(engine, thread), landing)
    await made.tell({"connect": landing.metadata().hex()})
    return made


def stages(case: Case, size: int, count: int) -> dict[str, float]:
    """GB/s of each step of the path alone, on one span after another: what limits the whole."""
    _, pool = make_engine(case, cached=False)
    pages, total = [list(range(case.tokens // case.page_size + 1))] * len(pool.layout.groups), case.tokens
    buffers = [allocate_memory(size) for _ in range(SLAB_SPANS)]

    def rate(work: Callable[[int], object]) -> float:
        work(0)
        started = time.perf_counter()
        for number in range(16):
            work(number)
        return 16 * size / (time.perf_counter() - started) / 1e9

    spans = [Span(start, count) for start in range(0, case.tokens - count + 1, count)]
    return {
        "gather": rate(lambda n: pool.gather(pages, spans[n % len(spans)], total, buffers[n % SLAB_SPANS])),
        "digest": rate(lambda n: digest(buffers[n % SLAB_SPANS])),
        "copy": rate(lambda n: buffers[n % SLAB_SPANS].copy()),
        "scatter": rate(lambda n: pool.scatter(pages, spans[n % len(spans)], total, buffers[n % SLAB_SPANS])),
    }


async def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Alternates both for `rounds`; seconds of each, and the ratio of the medians."""
    layout = layout_of(case.layout)
    count = span_limit(layout, case.span_tokens, int(case.slab_mib * MIB), int(case.staging_mib * MIB))
    sizes = [layout.span_bytes(span, case.tokens) for span in cut(0, case.tokens, count)]
    async with AsyncExitStack() as stack:
        receiver = await _receiver(case, stack)
        for _ in range(3):
            await receiver.hand_over()
            await receiver.raw(sizes)
        moved, raw, used = [], [], []
        for _ in range(rounds):
            before = await receiver.cpu()
            moved.append(await receiver.hand_over())
            used.append([after - start for start, after in zip(before, await receiver.cpu(), strict=True)])
            raw.append(await receiver.raw(sizes))
    return {
        "token_bytes": layout.token_bytes, "bytes": sum(sizes), "spans": len(sizes), "span_bytes": sizes[0],
        "hand_over_s": moved, "raw_s": raw, "ratio": median(raw) / median(moved),
        "cpu_s": {"sender": median(each[0] for each in used), "receiver": median(each[1] for each in used)},
        "stages_gb_per_s": stages(case, layout.token_bytes * count, count),
    }  # fmt: skip


def show(case: Case, found: dict[str, Any]) -> None:
    """One table."""
    size = found["bytes"]
    table = Table(
        title=f"{case.tokens} tokens of {case.layout}: {found['token_bytes']} bytes each, {size / 1e6:.1f} MB"
    )
    for column in ("", "ms, median", "ms, best", "GB/s, median"):
        table.add_column(column, justify="right")
    for name, seconds in (("hand-over", found["hand_over_s"]), ("raw writes", found["raw_s"])):
        middle = median(seconds)
        table.add_row(name, f"{middle * 1e3:.2f}", f"{min(seconds) * 1e3:.2f}", f"{size / middle / 1e9:.2f}")
    table.add_row("ratio", "", "", f"{found['ratio']:.2f}")
    for name, seconds in found["cpu_s"].items():
        table.add_row(f"CPU of the {name}", f"{seconds * 1e3:.2f}", "", "")
    for name, rate in found["stages_gb_per_s"].items():
        table.add_row(f"{name} alone", "", "", f"{rate:.2f}")
    Console().print(table)
    Console().print(f"{found['spans']} spans of {found['span_bytes'] / MIB:.2f} MiB, over {case.transport}")


def main(
    layout: str = "qwen2-370m",
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    span_tokens: int = DecodeConfig.model_fields["span_tokens"].default,
    slab_mib: float = DecodeConfig.model_fields["slab_mib"].default,
    staging_mib: float = PrefillConfig.model_fields["staging_mib"].default,
    transport: str = "nixl",
    threads: Annotated[int, typer.Option(min=1, help="compute threads of each process")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Defaults are the workers' own."""
    case = Case(layout, tokens, span_tokens, slab_mib, staging_mib, transport, threads=threads)
    found = asyncio.run(measure(case, rounds))
    show(case, found)
    if json_file:
        reports.write_json(json_file, {"case": asdict(case), **found})


if __name__ == "__main__":
    typer.run(main)
