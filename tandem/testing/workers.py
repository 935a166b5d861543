"""Scripted workers for tests of the router: real gRPC servers, no engine. A test says what they answer and send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from tandem.cluster import CacheEvent, Role, Status, WorkerInfo, WorkerUpdate, new_id
from tandem.errors import TandemError
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.trust import TOKEN_KEY
from tandem.types import Delta, ModelInfo
from tandem.wire import codec
from tandem.wire.failures import abort_with
from tandem.wire.v1 import common_pb2, decode_pb2, decode_pb2_grpc, worker_pb2, worker_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

LAYOUT = KvLayout(planes=(Plane("k", 2, 8, "float32"), Plane("v", 2, 8, "float32")), groups=(LayerGroup((0, 1)),))
MODEL = ModelInfo("fake", "/models/fake", "f1f2", vocab_size=1000, max_context=4096, eos_token_ids=(2,))


def fake_info(role: Role, address: str = "127.0.0.1:1", **changes: Any) -> WorkerInfo:
    """A plausible worker; `changes` are fields of WorkerInfo."""
    info = WorkerInfo(
        incarnation=new_id(),
        role=role,
        address=address,
        model=MODEL,
        layout=LAYOUT,
        kv_dtype="float32",
        page_size=16,
        total_pages=256,
        max_batch_tokens=256,
        transport="tcp",
    )
    return replace(info, **changes)


class FakeWorker(worker_pb2_grpc.WorkerServicer, decode_pb2_grpc.DecodeServicer):
    """One worker. Restart it by starting another one on the same port.

    `refusal` is raised by Submit; `hold` and `hold_cancel` make Submit and Cancel wait; `watchable` False makes Watch
    say nothing.
    """

    def __init__(self, role: Role, port: int = 0, **changes: Any) -> None:
        self._port = port
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.info = fake_info(role, **changes)
        self.submissions: list[decode_pb2.SubmitRequest] = []
        self.resumes: list[list[decode_pb2.ResumePoint]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.watches = 0
        self.tokens: set[str] = set()
        """The cluster's token, as routers showed it."""
        self.snapshot: tuple[CacheEvent, ...] = ()
        self.refusal: TandemError | None = None
        self.hold: asyncio.Event | None = None
        self.hold_cancel: asyncio.Event | None = None
        self.watchable = True
        self.changed = asyncio.Condition()
        """Notified at every call."""
        self.drained: list[str] = []
        self._ends: list[asyncio.Task[None]] = []
        self._watchers: list[asyncio.Queue[WorkerUpdate | None]] = []
        self._sequences: list[int] = []
        self._streams: list[asyncio.Queue[list[Delta] | None]] = []

    async def start(self) -> None:
        """Listens; `info.address` is set."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        if self.info.role is Role.DECODE:
            decode_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.info = replace(self.info, address=f"127.0.0.1:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        """Dies: every connection breaks."""
        await self._server.stop(None)

    @property
    def port(self) -> int:
        """The port taken."""
        return self._port

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    # What tests make it do ------------------------------------------------------------------------------------------

    def publish(self, *events: CacheEvent, status: Status | None = None, skip: int = 0) -> None:
        """Sends an update to every watcher. skip: sequence numbers left out, as if messages had been lost."""
        for place, queue in enumerate(self._watchers):
            self._sequences[place] += 1 + skip
            queue.put_nowait(WorkerUpdate(self.info.incarnation, self._sequences[place], events, status))

    def report(self, **fields: Any) -> None:
        """Sends a status."""
        self.publish(status=Status(self.info.incarnation, **fields))

    def send(self, *deltas: Delta) -> None:
        """Sends deltas on every open token stream, as one step."""
        for queue in self._streams:
            queue.put_nowait(list(deltas))

    def break_streams(self) -> None:
        """Ends every token stream; the subscription goes on."""
        for queue in self._streams:
            queue.put_nowait(None)

    @property
    def streams(self) -> int:
        """Token streams that are open."""
        return len(self._streams)

    async def until(self, condition: Any) -> None:
        """Waits until `condition()` holds; checked at every call that arrives."""
        async with self.changed, asyncio.timeout(10):
            await self.changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # Services -------------------------------------------------------------------------------------------------------

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Context) -> common_pb2.WorkerInfo:
        """What it is."""
        return codec.worker_info_to_wire(self.info)

    async def Audit(self, request: worker_pb2.AuditRequest, context: Context) -> worker_pb2.AuditReply:
        """Nothing is ever held."""
        return worker_pb2.AuditReply()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainReply:
        """Is gone a moment later."""
        self.drained.append(request.incarnation)
        asyncio.get_running_loop().call_soon(lambda: self._ends.append(asyncio.create_task(self._server.stop(0.1))))
        return worker_pb2.DrainReply(drain_s=1.0)

    async def Watch(self, request: worker_pb2.WatchRequest, context: Context) -> AsyncIterator[worker_pb2.WorkerUpdate]:
        """The snapshot, then what `publish` is told."""
        self.tokens |= {str(value) for key, value in context.invocation_metadata() or () if key == TOKEN_KEY}
        queue: asyncio.Queue[WorkerUpdate | None] = asyncio.Queue()
        self._watchers.append(queue)
        self._sequences.append(0)
        place = len(self._watchers) - 1
        self.watches += 1
        try:
            if self.watchable:
                first = WorkerUpdate(self.info.incarnation, 0, self.snapshot, snapshot=True)
                yield codec.worker_update_to_wire(first)
            await self._notify()
            while (update := await queue.get()) is not None:
                yield codec.worker_update_to_wire(update)
        finally:
            self._watchers[place] = asyncio.Queue()

    async def Submit(self, request: decode_pb2.SubmitRequest, context: Context) -> decode_pb2.SubmitReply:
        """Takes the request or raises `refusal`."""
        self.submissions.append(request)
        await self._notify()
        if self.hold is not None:
            await self.hold.wait()
        if self.refusal is not None:
            await abort_with(context, self.refusal)
        asked = "" if request.planned_local or not request.prefill else request.prefill[0].incarnation
        return decode_pb2.SubmitReply(cached_tokens=request.expected_cached, prefill=asked)

    async def Stream(
        self, request: decode_pb2.StreamRequest, context: Context
    ) -> AsyncIterator[decode_pb2.StepMessage]:
        """An empty message, then what `send` is told."""
        queue: asyncio.Queue[list[Delta] | None] = asyncio.Queue()
        self._streams.append(queue)
        self.resumes.append(list(request.resume))
        try:
            yield decode_pb2.StepMessage(incarnation=self.info.incarnation)
            await self._notify()
            while (deltas := await queue.get()) is not None:
                wire = [codec.delta_to_wire(delta) for delta in deltas]
                yield decode_pb2.StepMessage(incarnation=self.info.incarnation, deltas=wire)
        finally:
            self._streams.remove(queue)

    async def Cancel(self, request: decode_pb2.CancelRequest, context: Context) -> decode_pb2.CancelReply:
        """Notes it."""
        self.cancelled.append((request.request_id, request.attempt))
        await self._notify()
        if self.hold_cancel is not None:
            await self.hold_cancel.wait()
        return decode_pb2.CancelReply(known=True)


def answer(request: decode_pb2.SubmitRequest, tokens: Sequence[int], first: int = 0, **fields: Any) -> Delta:
    """A delta for a submitted request; `fields` are those of Delta."""
    choice = fields.pop("choice", 0)
    return Delta(request.request.request_id, request.request.attempt, choice, first, tuple(tokens), **fields)
