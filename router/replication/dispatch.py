"""Asks a worker to fetch a prefix from another one."""

from __future__ import annotations

from dataclasses import dataclass

import grpc.aio

from router.workers.fleet_link import Worker
from tandem.types import TokenIds
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import handover_pb2, handover_pb2_grpc

COPY_S = 30.0
"""A copy that takes longer is given up."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of a copy."""

    moved_tokens: int
    bytes: int
    seconds: float


async def copy(target: Worker, source: Worker, tokens: TokenIds, salt: str, adapter: str) -> Copied:
    """Returns when `target` has the prefix; cancelled, it ends there, too. Raises a TandemError with the reason."""
    request = handover_pb2.ReplicateRequest(
        incarnation=target.incarnation,
        source=source.incarnation,
        source_address=source.info.address,
        tokens=tokens,
        salt=salt,
        adapter=adapter,
    )
    try:
        reply = await handover_pb2_grpc.ReplicationStub(target.channel).Replicate(request, timeout=COPY_S)
    except grpc.aio.AioRpcError as failure:
        raise error_of_rpc(failure) from None
    return Copied(reply.moved_tokens, reply.bytes, reply.seconds)
