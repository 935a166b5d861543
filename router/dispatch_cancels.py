"""Makes workers let go of what nobody waits for any more."""

from __future__ import annotations

import asyncio
import logging

import grpc.aio

from router.workers.fleet import Fleet
from tandem.cluster import Incarnation
from tandem.obs import tell_request
from tandem.wire.v1 import decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)

CALL_S = 5.0
TRIES = 3
RETRY_S = 0.2


class Cancels:
    """The cancellations under way."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tasks: dict[tuple[Incarnation, str, int], asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._tasks)

    def send(self, incarnation: Incarnation, request_id: str, attempt: int) -> asyncio.Task[None]:
        """The task that makes a worker let go of an attempt; one at a time for each."""
        key = (incarnation, request_id, attempt)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(self._send(*key))
            task.add_done_callback(lambda _: self._tasks.pop(key))
        return task

    async def _send(self, incarnation: Incarnation, request_id: str, attempt: int) -> None:
        tell_request(request_id)
        for _ in range(TRIES):
            worker = self._fleet.worker(incarnation)
            if worker is None:
                return
            message = decode_pb2.CancelRequest(request_id=request_id, attempt=attempt)
            try:
                await decode_pb2_grpc.DecodeStub(worker.channel).Cancel(message, timeout=CALL_S)
            except grpc.aio.AioRpcError as failure:
                log.info("cancelling %s at %s failed: %s", request_id, incarnation, failure.code().name)
                await asyncio.sleep(RETRY_S)
            else:
                return
        log.warning("request %s could not be cancelled at %s; it ends by itself there", request_id, incarnation)

    async def settle(self, timeout_s: float) -> None:
        """Waits for those under way."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
