"""Where workers announce themselves: the `Registry` service on the router's control port."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from router.workers.fleet import Fleet
from tandem.errors import BadRequest, ConfigError, TandemError
from tandem.ports import authority, check_port
from tandem.trust import Trust
from tandem.wire import codec
from tandem.wire.failures import abort_with
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

RELAYED = ("tandem-relayed", "1")
"""Marks an announcement that came from another process of this router and goes no further."""
RELAY_S = 2.0


class RegistryService(worker_pb2_grpc.RegistryServicer):
    """`Registry` of proto/tandem/wire/v1/worker.proto. Thin: the fleet decides."""

    def __init__(self, fleet: Fleet, relay: Relay | None) -> None:
        self._fleet = fleet
        self._relay = relay

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.RegisterReply:
        """Takes a worker in or renews its lease; refuses one of another model or layout."""
        try:
            self._register(request)
        except TandemError as error:
            await abort_with(context, error)
        if self._relay is not None and RELAYED not in (context.invocation_metadata() or ()):
            self._relay.tell(request)
        known = self._fleet.prefill_workers()
        return worker_pb2.RegisterReply(
            router_id=self._fleet.router_id,
            lease_s=self._fleet.lease_s,
            prefill=[worker_pb2.WorkerAddress(incarnation=name, address=address) for name, address in known],
        )

    def _register(self, request: worker_pb2.RegisterRequest) -> None:
        try:
            info = codec.worker_info_from_wire(request.worker)
        except ValueError as error:
            raise BadRequest(f"worker: {error}", param="worker") from None
        self._fleet.register(info, request.leaving)


class Relay:
    """Tells the other processes of this router who announced itself: workers know one control port, the first one's."""

    def __init__(self, folder: Path, index: int, count: int, trust: Trust = Trust()) -> None:
        self._trust = trust
        self.first = index == 0
        self.mine = self._address(folder, index)
        self._others = [self._address(folder, other) for other in range(count) if other != index]
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def _address(folder: Path, index: int) -> str:
        return f"unix:{folder}/control-{index}"

    def tell(self, request: worker_pb2.RegisterRequest) -> None:
        """Passes an announcement on. One that gets lost is made up for by the worker's next."""
        for address in self._others:
            task = asyncio.create_task(self._tell(address, request), name=f"relay-{address}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell(self, address: str, request: worker_pb2.RegisterRequest) -> None:
        if address not in self._channels:
            self._channels[address] = self._trust.channel(address)
        try:
            stub = worker_pb2_grpc.RegistryStub(self._channels[address])
            await stub.Register(request, timeout=RELAY_S, metadata=(RELAYED,))
        except grpc.aio.AioRpcError as failure:
            log.info("an announcement did not reach the process at %s: %s", address, failure.code().name)

    async def close(self) -> None:
        """Ends what is under way."""
        for task in self._tasks:
            task.cancel()
        for channel in self._channels.values():
            await channel.close()


async def serve_registry(fleet: Fleet, host: str, port: int, relay: Relay | None = None) -> tuple[grpc.aio.Server, int]:
    """Starts the control port; returns the server and the port taken. Raises ConfigError when it is not free.

    relay: to the other processes of this router; only the first of them has the control port, the port taken is else 0.
    """
    trust = fleet.trust
    server = trust.server([("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_RegistryServicer_to_server(RegistryService(fleet, relay), server)
    if relay is not None:
        trust.listen(server, relay.mine)
        if not relay.first:
            await server.start()
            return server, 0
    check_port(host, port, "--control-port")
    try:
        taken = trust.listen(server, authority(host, port))
    except RuntimeError as error:
        raise ConfigError(f"--control-port: {authority(host, port)}: {error}", param="control_port") from None
    await server.start()
    return server, taken
