"""Measures, for an operator, how fast KV comes to this worker from another one: `Probing` of the wire's definitions.

A pair is made under an incarnation drawn for the purpose, so that the pair that requests use is not touched. Nothing
but its warm-up writes goes over it; then it is closed. One probe runs at a time, in a slab that counts against the cap
of all slabs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc.aio

from tandem.cluster import Incarnation
from tandem.errors import Fenced, Overloaded, TandemError, Unavailable
from tandem.wire.failures import abort_with
from tandem.wire.v1 import probing_pb2 as pb
from tandem.wire.v1 import probing_pb2_grpc as rpc


class ProbePair(Protocol):
    """See `kvtransfer.inbound.PairClient`: the part that is used here."""

    @property
    def transport(self) -> str:
        """What the bytes go over."""

    @property
    def warm_bytes(self) -> int:
        """Of one warm-up write."""

    @property
    def warm_s(self) -> Sequence[float]:
        """How long each took."""

    async def connect(self) -> None:
        """Handshake and warm-up writes. Raises TandemError."""

    async def close(self) -> None:
        """Ends the pair and gives its slab back."""


class ProbingService(rpc.ProbingServicer):
    """`Probing` of proto/tandem/wire/v1/probing.proto."""

    def __init__(
        self,
        incarnation: Incarnation,
        hash_root: bytes,
        make_pair: Callable[[Incarnation, str], ProbePair],
        draining: Callable[[], bool],
    ) -> None:
        """make_pair: a pair of its own with a sender at an address. draining: whether no probe is to begin."""
        self._incarnation = incarnation
        self._hash_root = hash_root.hex()
        self._make_pair = make_pair
        self._draining = draining
        self._busy = False

    def attach(self, server: grpc.aio.Server) -> None:
        """Makes `server` answer the calls of `Probing`."""
        rpc.add_ProbingServicer_to_server(self, server)

    async def Probe(self, request: pb.ProbeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ProbeReply:
        """Answers when the writes have landed; who cancels the call ends the probe."""
        try:
            if request.incarnation != self._incarnation:
                raise Fenced(f"this worker is {self._incarnation}, not {request.incarnation}")
            if not request.sender:
                return pb.ProbeReply(hash_root=self._hash_root)
            if self._draining():
                raise Unavailable("this worker is draining")
            if self._busy:
                raise Overloaded("another probe is under way; one at a time")
            self._busy = True
            try:
                return await self._measure(request.sender, request.sender_address)
            finally:
                self._busy = False
        except TandemError as error:
            await abort_with(context, error)
        raise AssertionError("abort raises")

    async def _measure(self, sender: Incarnation, address: str) -> pb.ProbeReply:
        clock = asyncio.get_running_loop().time
        pair, started = self._make_pair(sender, address), clock()
        try:
            await pair.connect()
            took = clock() - started
        finally:
            # The slab must come back even if who asked has gone.
            await asyncio.shield(pair.close())
        writes = list(pair.warm_s)
        return pb.ProbeReply(
            hash_root=self._hash_root,
            transport=pair.transport,
            write_bytes=pair.warm_bytes,
            write_s=writes,
            connect_s=max(0.0, took - sum(writes)),
        )

    def leaks(self) -> list[str]:
        """What is under way."""
        return ["a probe is under way"] if self._busy else []
