"""Asking one worker something once: for the command line and for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from tandem.cluster import WorkerInfo
from tandem.errors import ConfigError, Unavailable
from tandem.trust import Trust
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import probing_pb2, probing_pb2_grpc, worker_pb2, worker_pb2_grpc

ANSWER_S = 2.0


class Silent(Unavailable):
    """Nobody answered in time, and nobody refused: it may be busy, or stand still."""


async def describe(address: str, trust: Trust = Trust()) -> WorkerInfo | None:
    """What the worker at `address` is; None when nobody answers."""
    try:
        return await identify(address, trust)
    except (ConfigError, Unavailable):
        return None


async def identify(address: str, trust: Trust = Trust()) -> WorkerInfo:
    """What the worker at `address` is.

    Raises Unavailable when nobody answers (Silent: in time), ConfigError when it knows another token.
    """
    async with trust.channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            return codec.worker_info_from_wire(await stub.Describe(worker_pb2.DescribeRequest(), timeout=ANSWER_S))
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"TANDEM_TOKEN: {address} knows another one; give its cluster's", "token") from None
            kind = Silent if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED else Unavailable
            raise kind(f"no worker answers at {address}: {_reason(failure)}") from None


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


PROBE_S = 30.0
"""More than the handshake's deadline: the worker itself says why it took too long."""
AT_ONCE = 32
"""Workers asked at once."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Answered:
    """What the worker at an address says of itself."""

    address: str
    info: WorkerInfo
    hash_root: str
    """Equal for all processes of a cluster."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast KV went from one worker to another."""

    sender: str
    receiver: str
    """Addresses."""
    transport: str = ""
    write_bytes: int = 0
    writes: int = 0
    best_s: float = 0.0
    connect_s: float = 0.0
    error: str = ""

    @property
    def mib_per_s(self) -> float:
        """Of the best write; the others waited for something else."""
        return self.write_bytes / MIB / self.best_s if self.best_s else 0.0


async def ask_workers(addresses: Sequence[str], trust: Trust) -> tuple[dict[str, Answered], dict[str, str]]:
    """By address: who is there, and why nobody answers."""
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(address: str) -> Answered | str:
        async with room:
            return await _ask(address, trust)

    answers = await asyncio.gather(*(ask(address) for address in addresses))
    told = dict(zip(addresses, answers, strict=True))
    return (
        {address: answer for address, answer in told.items() if isinstance(answer, Answered)},
        {address: answer for address, answer in told.items() if isinstance(answer, str)},
    )


async def _ask(address: str, trust: Trust) -> Answered | str:
    try:
        info = await identify(address, trust)
    except (ConfigError, Unavailable) as error:
        return str(error)
    async with trust.channel(address) as channel:
        nothing = probing_pb2.ProbeRequest(incarnation=info.incarnation)
        try:
            reply = await probing_pb2_grpc.ProbingStub(channel).Probe(nothing, timeout=ANSWER_S)
        except grpc.aio.AioRpcError as failure:
            return f"it does not tell its cluster: {_reason(failure)}"
        return Answered(address, info, reply.hash_root)


async def measure_pairs(pairs: Sequence[tuple[Answered, Answered]], trust: Trust) -> list[Measured]:
    """(sender, receiver) -> how fast, one after the other: two at once would measure each other."""
    return [await _measure(sender, receiver, trust) for sender, receiver in pairs]


async def _measure(sender: Answered, receiver: Answered, trust: Trust) -> Measured:
    asked = probing_pb2.ProbeRequest(
        incarnation=receiver.info.incarnation, sender=sender.info.incarnation, sender_address=sender.address
    )
    async with trust.channel(receiver.address) as channel:
        try:
            reply = await probing_pb2_grpc.ProbingStub(channel).Probe(asked, timeout=PROBE_S)
        except grpc.aio.AioRpcError as failure:
            return Measured(sender.address, receiver.address, error=_reason(failure))
    return Measured(
        sender.address,
        receiver.address,
        reply.transport,
        reply.write_bytes,
        len(reply.write_s),
        min(reply.write_s, default=0.0),
        reply.connect_s,
    )


def _reason(failure: grpc.aio.AioRpcError) -> str:
    return " ".join((failure.details() or failure.code().name).split())
