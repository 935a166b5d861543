"""Announces a worker at its routers and renews the lease; its end is a goodbye."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from tandem.cluster import WorkerInfo
from tandem.trust import Trust
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)
RETRY_S = 0.5
"""Between tries while a router does not answer: it may be starting."""
RECONNECT: tuple[tuple[str, Any], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
"""gRPC itself waits for up to two minutes: a router that was away for long would be back without workers."""

Discovered = Callable[[Sequence[tuple[str, str]]], None]
"""Receives (incarnation, address) of the prefill workers a router knows."""


class Registrar:
    """Keeps one worker registered at every router of a list, for as long as `run` runs."""

    def __init__(
        self,
        worker: WorkerInfo,
        routers: Sequence[str],
        discovered: Discovered,
        trust: Trust = Trust(),
    ) -> None:
        """trust: how routers know this worker."""
        self._trust = trust
        self._worker = codec.worker_info_to_wire(worker)
        self._routers = routers
        self._discovered = discovered
        self.goodbye = True
        """Whether routers are told when `run` is cancelled: what ran here was given up in order."""

    async def run(self) -> None:
        """Registers and renews until cancelled, then says goodbye."""
        async with asyncio.TaskGroup() as group:
            for router in self._routers:
                group.create_task(self._keep(router))

    async def _keep(self, router: str) -> None:
        async with self._trust.channel(router, RECONNECT) as channel:
            stub = worker_pb2_grpc.RegistryStub(channel)
            try:
                reachable = True
                while True:
                    try:
                        reply = await stub.Register(worker_pb2.RegisterRequest(worker=self._worker), timeout=5.0)
                    except grpc.aio.AioRpcError as error:
                        if reachable:
                            log.warning("router %s does not take the registration: %s", router, error.details())
                        reachable = False
                        await asyncio.sleep(RETRY_S)
                        continue
                    if not reachable:
                        log.info("registered at router %s", router)
                    reachable = True
                    self._discovered([(p.incarnation, p.address) for p in reply.prefill])
                    await asyncio.sleep(min(reply.lease_s / 4, 1.0))
            except asyncio.CancelledError:
                if self.goodbye:
                    await self._leave(stub)
                raise

    async def _leave(self, stub: worker_pb2_grpc.RegistryAsyncStub) -> None:
        try:
            await stub.Register(worker_pb2.RegisterRequest(worker=self._worker, leaving=True), timeout=1.0)
        except grpc.aio.AioRpcError as error:
            log.info("the router did not hear the goodbye: %s", error.code().name)
