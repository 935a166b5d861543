"""The one token stream between this router and one decode worker, kept up for as long as the worker lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

import grpc
import grpc.aio

from router.workers.fleet_link import Worker
from tandem.cluster import Incarnation
from tandem.errors import Unavailable
from tandem.wire.v1 import common_pb2, decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)

RETRY_S = 0.05


class DeltaSink(Protocol):
    """Where a stream's tokens go: the dispatcher."""

    def receive(self, incarnation: Incarnation, deltas: Iterable[common_pb2.Delta]) -> None:
        """New tokens of any requests of that worker."""

    def resume_points(self, incarnation: Incarnation) -> list[decode_pb2.ResumePoint]:
        """Where the requests that this worker has taken should go on."""

    def stream_lost(self, incarnation: Incarnation, reason: str) -> None:
        """The stream could not be opened for a lease; what it carried cannot go on."""


class WorkerStream:
    """Opens `Decode.Stream` and opens it again, with resume points, when it breaks.

    The worker must answer an opened stream at once, with a message or with its initial metadata: from then on it knows
    this router, and requests can be submitted.
    """

    def __init__(self, worker: Worker, router_id: str, lease_s: float, sink: DeltaSink) -> None:
        self._worker = worker
        self._router_id = router_id
        self._lease_s = lease_s
        self._sink = sink
        self._up = asyncio.Event()
        self._call: grpc.aio.UnaryStreamCall[decode_pb2.StreamRequest, decode_pb2.StepMessage] | None = None
        self.generation = 0
        """Counts the times that resume points were taken."""
        self._task = asyncio.create_task(self._run(), name=f"stream-{worker.incarnation}")

    async def ready(self, timeout: float) -> None:
        """Returns when the worker knows this router. Raises Unavailable after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"decode worker {self._worker.incarnation} opens no token stream") from None

    def reopen(self) -> None:
        """Opens the stream anew, with resume points: one of its requests may have missed tokens."""
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Ends the stream for good."""
        self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        last_up = loop.time()
        while True:
            try:
                await self._once()
                reason = "the worker ended it"
            except grpc.aio.AioRpcError as failure:
                reason = failure.code().name
            except Unavailable as error:
                reason = str(error)
            if self._up.is_set():
                last_up = loop.time()
                log.warning("token stream of decode worker %s broke: %s", self._worker.incarnation, reason)
            self._up.clear()
            if loop.time() - last_up > self._lease_s:
                last_up = loop.time()
                self._sink.stream_lost(self._worker.incarnation, reason)
            await asyncio.sleep(RETRY_S)

    async def _once(self) -> None:
        incarnation = self._worker.incarnation
        self.generation += 1
        resume = self._sink.resume_points(incarnation)
        stub = decode_pb2_grpc.DecodeStub(self._worker.channel)
        self._call = call = stub.Stream(decode_pb2.StreamRequest(router_id=self._router_id, resume=resume))
        try:
            await call.initial_metadata()
            async for message in call:
                if message.incarnation != incarnation:
                    raise Unavailable(f"{message.incarnation} answers in its place")
                self._up.set()
                if message.deltas:
                    self._sink.receive(incarnation, message.deltas)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Unavailable("it is opened anew") from None
        finally:
            self._call = None
            call.cancel()
