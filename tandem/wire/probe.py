"""Asking one worker something once: for the command line and for tests."""

from __future__ import annotations

import grpc
import grpc.aio

from tandem.cluster import WorkerInfo
from tandem.trust import Trust
from tandem.wire import codec
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


async def audit(address: str, trust: Trust = Trust()) -> list[str] | None:
    """What the worker at `address` holds although nothing runs; None when nobody answers."""
    async with trust.channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return list((await stub.Audit(worker_pb2.AuditRequest(), timeout=ANSWER_S)).leaks)
        except grpc.aio.AioRpcError:
            return None
