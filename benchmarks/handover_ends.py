"""Both ends of the hand-over benchmark. The sender's end runs in a process of its own and obeys lines on its stdin.

Everything between the two KV pools is Tandem's own: engines, hand-over service, staging, slab, NIXL. Only the forward
pass is missing: prompts are cached at the sender, so that what is measured is the moving.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio
import torch

from kvtransfer.backends import choose
from kvtransfer.base import MIB, Backend, Identity
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.slab import allocate_memory
from kvtransfer.transfer_thread import TransferThread
from tandem.engine.engine import Engine
from tandem.engine.kv_pool import KvPool
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Batch, Sampled
from tandem.kv import HashRoot, KvLayout, LayerGroup, Plane
from tandem.worker.engine_thread import EngineThread
from tandem.worker.kv_source import EngineKvSource

FINGERPRINT = "benchmark"
ROOT = HashRoot("benchmark", FINGERPRINT, "bfloat16")
LAYOUTS = {"qwen2-370m": (24, 2, 64), "llama-8b": (32, 8, 128)}
"""Layers, KV heads, dimension of a head; K and V in bfloat16."""

RAW_POLL_S = 0.0001


def layout_of(name: str) -> KvLayout:
    """Raises ValueError with the names there are."""
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name}; it must be one of {', '.join(LAYOUTS)}")
    layers, heads, dim = LAYOUTS[name]
    planes = (Plane("k", heads, dim, "bfloat16"), Plane("v", heads, dim, "bfloat16"))
    return KvLayout(planes, (LayerGroup(tuple(range(layers))),))


@dataclass(frozen=True, slots=True)
class Case:
    """What both processes must agree on."""

    layout: str
    tokens: int
    span_tokens: int
    slab_mib: float
    staging_mib: float
    transport: str
    page_size: int = 16
    threads: int = 1

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt that is handed over again and again."""
        return tuple(range(self.tokens))


class NoForward:
    """A `RunnerLike` that leaves the KV as it is."""

    def launch(self, batch: Batch, after: Batch | None = None) -> Batch:
        """Nothing is computed."""
        return batch

    def collect(self, flight: Batch) -> list[Sampled]:
        """Nothing is sampled."""
        return [Sampled(None) for _ in flight.rows]


def make_engine(case: Case, cached: bool) -> tuple[Engine, KvPool]:
    """An engine with room for two prompts, its KV random; `cached`: it keeps what it has computed."""
    torch.set_num_threads(case.threads)
    layout = layout_of(case.layout)
    pool = KvPool(layout, 2 * (case.tokens // case.page_size + 2), case.page_size, torch.device("cpu"))
    for plane in layout.planes:
        for layer in range(layout.num_layers):
            pool.plane(plane.name, layer).normal_()
    return Engine(NoForward(), pool, EngineConfig(max_batch_tokens=case.tokens, prefix_cache=cached)), pool


class RawSender:
    """Plain writes of the same sizes: what the wire gives when nothing is gathered, checked or asked for."""

    def __init__(self, backend: Backend, case: Case) -> None:
        self._staging = allocate_memory(int(case.staging_mib * MIB))
        self._link = backend.link("raw-sender", "raw-receiver", self._staging)

    def connect(self, metadata: str) -> None:
        """To the receiver's landing."""
        self._link.connect(bytes.fromhex(metadata))

    def send(self, sizes: list[int], slab: int, depth: int) -> float:
        """Writes `sizes` one after another with at most `depth` under way; seconds until all are complete."""
        offset, open_writes = 0, list[Any]()
        started = time.perf_counter()
        for number, size in enumerate(sizes):
            while len(open_writes) >= depth:
                open_writes = self._wait(open_writes)
            offset = 0 if offset + size > min(slab, self._staging.nbytes) else offset
            view = self._staging[offset : offset + size]
            open_writes.append(self._link.post(view, offset, number.to_bytes(4, "little")))
            offset += size
        while open_writes:
            open_writes = self._wait(open_writes)
        return time.perf_counter() - started

    def _wait(self, open_writes: list[Any]) -> list[Any]:
        """A round of polling. Polling without a pause takes the core from the other end, on few cores."""
        left = [handle for handle in open_writes if not self._link.poll(handle)]
        if len(left) == len(open_writes):
            time.sleep(RAW_POLL_S)
        return left

    def close(self) -> None:
        self._link.close()


async def serve(case: Case, incarnation: str) -> None:
    """The sender: announces its port, then obeys the commands connect, raw and cpu until stdin ends."""
    loop = asyncio.get_running_loop()
    engine, _ = make_engine(case, cached=True)
    sources: list[EngineKvSource] = []
    thread = EngineThread(engine, lambda output: sources[0].on_step(output), lambda error: loop.stop())
    thread.start()
    sources.append(EngineKvSource(engine, thread, ROOT, engine.capacity_tokens, computes=True))
    transfers = TransferThread()
    transfers.start()
    chosen = choose(case.transport)
    me = Identity(incarnation, engine.layout, FINGERPRINT)
    service = HandOverService(me, sources[0], chosen.all, transfers, OutboundSettings(case.staging_mib))
    server = grpc.aio.server()
    service.attach(server)
    _say({"port": server.add_insecure_port("127.0.0.1:0")})
    await server.start()
    raw = RawSender(chosen.preferred, case)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if "connect" in command:
            raw.connect(command["connect"])
            _say({})
        elif "cpu" in command:
            _say({"seconds": time.process_time()})
        else:
            seconds = await loop.run_in_executor(None, partial(raw.send, **command["raw"]))
            _say({"seconds": seconds})
    raw.close()
    await server.stop(None)
    await service.close()
    transfers.close()
    await thread.stop()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve(Case(**json.loads(sys.argv[1])), sys.argv[2]))
