"""What every worker answers over gRPC, whatever its role: who it is, and its updates. No decision is made here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from tandem.cluster import WorkerInfo
from tandem.errors import Fenced
from tandem.wire import codec
from tandem.wire.failures import abort_with
from tandem.wire.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.publish import Publisher


def server_options(lease_s: float) -> tuple[tuple[str, int], ...]:
    """Of a worker's gRPC server: a taken port is an error, and prompts of a million tokens fit into a message.

    Connections are pinged: a peer that stands still keeps its connection open and would keep its lease for ever.
    """
    return (
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", 64 << 20),
        ("grpc.max_send_message_length", 64 << 20),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_time_ms", max(1000, int(lease_s * 500))),
        ("grpc.keepalive_timeout_ms", max(1000, int(lease_s * 1000))),
    )


def attach(server: grpc.aio.Server, service: WorkerService) -> None:
    """Makes `server` answer the calls of `Worker`."""
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """`Worker` of proto/tandem/wire/v1/worker.proto."""

    def __init__(
        self,
        info: WorkerInfo,
        publisher: Publisher,
        leaks: Callable[[], Awaitable[list[str]]],
        drain: Callable[[], float],
    ) -> None:
        """drain: begins the worker's orderly end; the seconds that it takes at most."""
        self._drain = drain
        self._info = codec.worker_info_to_wire(info)
        self._publisher = publisher
        self._leaks = leaks

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> common_pb2.WorkerInfo:
        """What this worker is."""
        return self._info

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WorkerUpdate]:
        """A snapshot, then every change."""
        async for update in self._publisher.watch():
            yield codec.worker_update_to_wire(update)

    async def Audit(
        self, request: worker_pb2.AuditRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.AuditReply:
        """What is held although nothing runs."""
        return worker_pb2.AuditReply(leaks=await self._leaks())

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainReply:
        """Ends this incarnation in order."""
        if request.incarnation != self._info.incarnation:
            await abort_with(context, Fenced(f"{request.incarnation} is not here; this is {self._info.incarnation}"))
        return worker_pb2.DrainReply(drain_s=self._drain())
