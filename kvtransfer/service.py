"""The sender: the gRPC service `HandOver`, one stream for each receiver incarnation."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from kvtransfer.base import MIB, Backend, Hooks, Identity, KvSource, Link, TransportError
from kvtransfer.leases import LeaseTable
from kvtransfer.outbound import OutboundPair
from kvtransfer.slab import Staging
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import Incarnation
from tandem.errors import Fenced
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc

log = logging.getLogger(__name__)

MAX_LEASE_S = 3600.0


@dataclass(frozen=True, slots=True)
class OutboundSettings:
    """A sender's settings."""

    staging_mib: float = 32.0
    handshake_deadline_s: float = 10.0


class HandOverService(rpc.HandOverServicer):
    """Serves what `source` has to any receiver of the same model and layout. Stop the gRPC server first, then `close`."""

    def __init__(
        self,
        me: Identity,
        source: KvSource,
        backends: Sequence[Backend],
        thread: TransferThread,
        settings: OutboundSettings,
        hooks: Hooks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me, self._source, self._thread, self._settings = me, source, thread, settings
        self._backends = {backend.name: backend for backend in backends}
        self._hooks = hooks or Hooks()
        self._clock = clock
        self._staging = Staging(max(4096, int(settings.staging_mib * MIB)))
        self._pairs: dict[Incarnation, OutboundPair] = {}
        self._closing = False

    async def Pair(
        self,
        request_iterator: AsyncIterator[pb.ToSender],
        context: grpc.aio.ServicerContext[pb.ToSender, pb.ToReceiver],
    ) -> None:
        """One stream, opened by the receiver; its end voids every ticket of the pair."""
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                hello = await self._hello(request_iterator)
                pair, transport = await self._pair(hello)
        except Fenced as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TransportError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no handshake within handshake_deadline_s")
        tasks: list[asyncio.Task[None]] = []
        try:
            welcome = pb.Welcome(sender=self._me.incarnation, transport=transport, max_span_bytes=self._staging.size)
            await context.write(pb.ToReceiver(welcome=welcome))
            leases = LeaseTable(self._clock)
            leases.grant(pair.peer, hello.lease_s)
            works = (self._read(pair, leases, request_iterator), self._tick(pair, leases, hello.lease_s), self._warm(pair))
            tasks = [asyncio.create_task(work) for work in works]
            while (message := await pair.outbox.get()) is not None:
                await context.write(message)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.shield(self._drop(pair, "the stream ended"))
        await context.abort(grpc.StatusCode.UNAVAILABLE, pair.reason)

    async def close(self) -> None:
        """Closes all pairs and waits until no write is under way."""
        self._closing = True
        for pair in list(self._pairs.values()):
            await self._drop(pair, "the sender is closing")

    def leaks(self) -> list[str]:
        """What is in use, one line each; empty when nothing is being sent."""
        found = [line for pair in self._pairs.values() for line in pair.leaks()]
        if self._staging.used_bytes:
            found.append(f"{self._staging.used_bytes} bytes of the staging are in use")
        if self._thread.open_writes:
            found.append(f"{self._thread.open_writes} writes are under way")
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when staging or a ticket is inconsistent."""
        self._staging.check_integrity()
        for pair in self._pairs.values():
            pair.check_integrity()

    # --- handshake

    async def _hello(self, messages: AsyncIterator[pb.ToSender]) -> pb.Hello:
        first = await anext(aiter(messages), None)
        if first is None or first.WhichOneof("body") != "hello":
            raise Fenced("the first message must be hello")
        hello = first.hello
        for name, theirs, ours in (
            ("sender", hello.sender, self._me.incarnation),
            ("layout_digest", hello.layout_digest, self._me.layout.digest()),
            ("model_fingerprint", hello.model_fingerprint, self._me.fingerprint),
        ):
            if theirs != ours:
                raise Fenced(f"{name} is {theirs}; this worker's is {ours}")
        if not 0 < hello.lease_s <= MAX_LEASE_S:
            raise Fenced(f"lease_s is {hello.lease_s:g}; it must be in (0, {MAX_LEASE_S:g}]")
        if not hello.receiver:
            raise Fenced("receiver is empty")
        return hello

    async def _pair(self, hello: pb.Hello) -> tuple[OutboundPair, str]:
        endpoint = next((offer for offer in hello.endpoints if offer.transport in self._backends), None)
        if endpoint is None:
            offers = ", ".join(offer.transport for offer in hello.endpoints) or "nothing"
            raise Fenced(f"the receiver offers {offers}; this worker speaks {', '.join(self._backends)}")
        backend, peer, staging = self._backends[endpoint.transport], hello.receiver, self._staging.memory
        if (old := self._pairs.get(peer)) is not None:
            await self._drop(old, "replaced by a newer stream of the same receiver")

        def connect() -> Link:
            link = backend.link(self._me.incarnation, peer, staging)
            try:
                link.connect(endpoint.metadata)
            except TransportError:
                link.close()
                raise
            return link

        link = await in_thread(connect, lambda link: link.close())
        pair = OutboundPair(
            self._me, peer, backend.name, link, hello.slab_bytes, self._staging, self._thread, self._source, self._hooks
        )
        other, self._pairs[peer] = self._pairs.get(peer), pair
        if other is not None:
            other.shut("replaced by a newer stream of the same receiver")
        if self._closing:
            pair.shut("the sender is closing")
        return pair, backend.name

    async def _warm(self, pair: OutboundPair) -> None:
        pair.warm_up()
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                await pair.warmed.wait()
        except TimeoutError:
            pair.shut("warm-up was not answered within handshake_deadline_s")

    # --- the stream

    async def _read(self, pair: OutboundPair, leases: LeaseTable, messages: AsyncIterator[pb.ToSender]) -> None:
        try:
            async for message in messages:
                if not leases.renew(pair.peer):
                    return pair.shut("the receiver was silent for longer than lease_s")
                pair.on_message(message)
            pair.shut("the receiver ended the stream")
        except grpc.aio.BaseError as error:
            pair.shut(f"the stream broke: {error}")

    async def _tick(self, pair: OutboundPair, leases: LeaseTable, lease_s: float) -> None:
        next_ping = 0.0
        while True:
            if leases.expired():
                return pair.shut(f"the receiver was silent for lease_s = {lease_s:g}")
            if (now := self._clock()) >= next_ping:
                next_ping = now + lease_s / 3
                pair.ping()
            await asyncio.sleep(min(lease_s / 6, 1.0))

    async def _drop(self, pair: OutboundPair, reason: str) -> None:
        pair.shut(reason)
        await pair.wait_closed()
        if self._pairs.get(pair.peer) is pair:
            del self._pairs[pair.peer]
