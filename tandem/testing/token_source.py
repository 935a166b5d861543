"""A decode worker without an engine that sends tokens at a steady pace, for measuring what a router costs.

    python -m tandem.testing.token_source PORT MODEL_FOLDER STEP_MS [--hold]

Each step sends one token of every request in one message for each router, as a real worker does. It announces prompts
as stored and reports its status ten times a second. With `--hold` a request gets its first token and then nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio

from tandem.cluster import CacheEvent, EventKind, Role, Status, WorkerUpdate
from tandem.kv import HashRoot, block_hashes
from tandem.testing.workers import Context, fake_info
from tandem.types import ModelInfo
from tandem.wire import codec
from tandem.wire.v1 import common_pb2, decode_pb2, decode_pb2_grpc, worker_pb2, worker_pb2_grpc

FIRST_TOKEN = 300
"""Ids from here on are ordinary text in the demo model's vocabulary."""
STATUS_S = 0.1
MAX_CONTEXT = 1 << 16


class _Running:
    """A request on its way."""

    __slots__ = ("attempt", "limit", "prompt", "request_id", "sent", "start")

    def __init__(self, request: common_pb2.GenerateRequest, start: int) -> None:
        self.request_id = request.request_id
        self.attempt = request.attempt
        self.limit = request.sampling.max_tokens
        self.prompt = len(request.prompt)
        self.sent = 0
        self.start = start


class TokenSource(worker_pb2_grpc.WorkerServicer, decode_pb2_grpc.DecodeServicer):
    """The services of a decode worker, for any number of routers."""

    def __init__(self, port: int, model: Path, step_s: float, hold: bool) -> None:
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        info = ModelInfo("source", str(model), "f0" * 16, vocab_size=size, max_context=MAX_CONTEXT, eos_token_ids=(2,))
        self._info = fake_info(Role.DECODE, f"127.0.0.1:{port}", model=info, total_pages=1 << 20)
        self._tokens = size - FIRST_TOKEN
        self._step_s = step_s
        self._hold = hold
        self._running: dict[str, dict[str, _Running]] = {}
        self._streams: dict[str, asyncio.Queue[decode_pb2.StepMessage]] = {}
        self._watchers: list[asyncio.Queue[WorkerUpdate]] = []
        self._dispatches: dict[str, int] = {}
        self._taken = 0

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Context) -> common_pb2.WorkerInfo:
        """What it is."""
        return codec.worker_info_to_wire(self._info)

    async def Audit(self, request: worker_pb2.AuditRequest, context: Context) -> worker_pb2.AuditReply:
        """Nothing is ever held."""
        return worker_pb2.AuditReply()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainReply:
        """It has nothing to finish, and goes when it is told by a signal."""
        return worker_pb2.DrainReply()

    async def Watch(self, request: worker_pb2.WatchRequest, context: Context) -> AsyncIterator[worker_pb2.WorkerUpdate]:
        """An empty snapshot, then prompts and statuses."""
        queue: asyncio.Queue[WorkerUpdate] = asyncio.Queue()
        self._watchers.append(queue)
        incarnation, sequence = self._info.incarnation, 0
        try:
            yield codec.worker_update_to_wire(WorkerUpdate(incarnation, 0, status=self._status(), snapshot=True))
            while True:
                update = await queue.get()
                sequence += 1
                yield codec.worker_update_to_wire(
                    WorkerUpdate(incarnation, sequence, update.events, status=update.status)
                )
        finally:
            self._watchers.remove(queue)

    async def Submit(self, request: decode_pb2.SubmitRequest, context: Context) -> decode_pb2.SubmitReply:
        """Takes everything."""
        asked = request.request
        self._taken += 1
        mine = self._running.setdefault(request.router_id, {})
        mine[asked.request_id] = _Running(asked, self._taken)
        self._dispatches[request.router_id] = max(request.dispatch, self._dispatches.get(request.router_id, 0))
        root = HashRoot("tandem", self._info.model.fingerprint, self._info.kv_dtype, asked.adapter, asked.salt)
        hashes = tuple(block_hashes(root.digest(), asked.prompt))
        self._publish((CacheEvent(EventKind.STORED, hashes),) if hashes else ())
        return decode_pb2.SubmitReply(cached_tokens=request.expected_cached)

    async def Stream(
        self, request: decode_pb2.StreamRequest, context: Context
    ) -> AsyncIterator[decode_pb2.StepMessage]:
        """One message a step."""
        queue: asyncio.Queue[decode_pb2.StepMessage] = asyncio.Queue()
        self._streams[request.router_id] = queue
        yield decode_pb2.StepMessage(incarnation=self._info.incarnation)
        while True:
            yield await queue.get()

    async def Cancel(self, request: decode_pb2.CancelRequest, context: Context) -> decode_pb2.CancelReply:
        """Forgets it."""
        known = [mine.pop(request.request_id, None) for mine in self._running.values()]
        return decode_pb2.CancelReply(known=any(known))

    async def run(self) -> None:
        """Steps for ever."""
        due, reported = time.monotonic(), 0.0
        while True:
            for router_id, queue in self._streams.items():
                if deltas := self._step(self._running.get(router_id, {})):
                    queue.put_nowait(decode_pb2.StepMessage(incarnation=self._info.incarnation, deltas=deltas))
            if due - reported >= STATUS_S:
                reported = due
                self._publish((), self._status())
            due = max(due + self._step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    def _step(self, mine: dict[str, _Running]) -> list[common_pb2.Delta]:
        deltas = []
        for each in list(mine.values()):
            if self._hold and each.sent:
                continue
            delta = common_pb2.Delta(
                request_id=each.request_id,
                attempt=each.attempt,
                first_index=each.sent,
                tokens=[FIRST_TOKEN + (each.start * 31 + each.sent * 7) % self._tokens],
            )
            each.sent += 1
            if each.sent >= each.limit:
                delta.finish = common_pb2.FINISH_REASON_LENGTH
                delta.usage.prompt_tokens, delta.usage.completion_tokens = each.prompt, each.sent
                del mine[each.request_id]
            deltas.append(delta)
        return deltas

    def _status(self) -> Status:
        running = sum(map(len, self._running.values()))
        pages = self._info.total_pages
        return Status(
            self._info.incarnation,
            running=running,
            free_pages=pages,
            total_pages=pages,
            dispatches=dict(self._dispatches),
        )

    def _publish(self, events: tuple[CacheEvent, ...], status: Status | None = None) -> None:
        for queue in self._watchers:
            queue.put_nowait(WorkerUpdate(self._info.incarnation, 0, events, status))


async def _serve(port: int, model: Path, step_ms: float, hold: bool) -> None:
    source = TokenSource(port, model, step_ms / 1e3, hold)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(source, server)
    decode_pb2_grpc.add_DecodeServicer_to_server(source, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await source.run()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), "--hold" in sys.argv[4:]))
