"""Asking one worker something once: for the command line and for tests."""

from __future__ import annotations

import grpc
import grpc.aio

from tandem.cluster import WorkerInfo
from tandem.errors import ConfigError, Unavailable
from tandem.trust import Trust
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

ANSWER_S = 2.0


async def describe(address: str, trust: Trust = Trust()) -> WorkerInfo | None:
    """What the worker at `address` is; None when nobody answers."""
    async with trust.channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return codec.worker_info_from_wire(await stub.Describe(worker_pb2.DescribeRequest(), timeout=ANSWER_S))
        except grpc.aio.AioRpcError:
            return None


async def identify(address: str, trust: Trust = Trust()) -> WorkerInfo:
    """What the worker at `address` is.

    Raises Unavailable when nobody answers, ConfigError when it knows another token.
    """
    async with trust.channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return codec.worker_info_from_wire(await stub.Describe(worker_pb2.DescribeRequest(), timeout=ANSWER_S))
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"TANDEM_TOKEN: {address} knows another one; give its cluster's", "token") from None
            raise Unavailable(f"no worker answers at {address}: {failure.details() or failure.code().name}") from None


async def audit(address: str, trust: Trust = Trust()) -> list[str] | None:
    """What the worker at `address` holds although nothing runs; None when nobody answers."""
    async with trust.channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return list((await stub.Audit(worker_pb2.AuditRequest(), timeout=ANSWER_S)).leaks)
        except grpc.aio.AioRpcError:
            return None


async def drain(worker: WorkerInfo, trust: Trust = Trust()) -> float:
    """Tells a worker to end in order; returns the seconds that what is under way gets.

    Raises Fenced when another incarnation is there, Unavailable when nobody answers.
    """
    async with trust.channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            request = worker_pb2.DrainRequest(incarnation=worker.incarnation)
            return (await stub.Drain(request, timeout=ANSWER_S)).drain_s
        except grpc.aio.AioRpcError as failure:
            raise error_of_rpc(failure) from None
