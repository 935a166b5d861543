"""Where workers announce themselves: the `Registry` service on the router's control port."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from router.workers.fleet import Fleet
from tandem.errors import BadRequest, ConfigError, TandemError
from tandem.ports import authority, check_port
from tandem.wire import codec
from tandem.wire.failures import abort_with
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc


class RegistryService(worker_pb2_grpc.RegistryServicer):
    """`Registry` of proto/tandem/wire/v1/worker.proto. Thin: the fleet decides."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.RegisterReply:
        """Takes a worker in or renews its lease; refuses one of another model or layout."""
        try:
            self._register(request)
        except TandemError as error:
            await abort_with(context, error)
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


async def serve_registry(fleet: Fleet, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """Starts the control port; returns the server and the port taken. Raises ConfigError when it is not free."""
    check_port(host, port, "--control-port")
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_RegistryServicer_to_server(RegistryService(fleet), server)
    try:
        taken = server.add_insecure_port(authority(host, port))
    except RuntimeError as error:
        raise ConfigError(f"--control-port: {authority(host, port)}: {error}", param="control_port") from None
    await server.start()
    return server, taken
