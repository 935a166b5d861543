"""The sender: the gRPC service `HandOver`, one stream for each receiver incarnation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from kvtransfer.base import MIB, Backend, Hooks, Identity, KvSource, Link, TransportError
from kvtransfer.leases import LeaseTable
from kvtransfer.outbound import OutboundPair, Sender
from kvtransfer.slab import Staging
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import Incarnation
from tandem.errors import Fenced
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc

MAX_LEASE_S = 3600.0


@dataclass(frozen=True, slots=True)
class OutboundSettings:
    """A sender's settings; names and units are those of `WorkerConfig`."""

    staging_mib: float = 32.0
    handshake_deadline_s: float = 10.0
    quiesce_s: float = 5.0


class HandOverService(rpc.HandOverServicer):
    """Serves what `source` has to any receiver of the same model and layout.

    backends: the transports it can send with. At the end stop the gRPC server, `close` this, then the transfer thread.
    """

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
        self._me, self._thread, self._settings, self._clock = me, thread, settings, clock
        self._backends = {backend.name: backend for backend in backends}
        self._staging = Staging(max(4096, int(settings.staging_mib * MIB)))
        self._sender = Sender(me, source, self._staging, thread, hooks or Hooks(), settings.quiesce_s)
        self._leases = LeaseTable(clock)
        self._pairs: dict[Incarnation, OutboundPair] = {}
        self._closing = False

    def attach(self, server: grpc.aio.Server) -> None:
        """Makes `server` answer the calls of `HandOver`."""
        rpc.add_HandOverServicer_to_server(self, server)

    async def Pair(  # type: ignore[override]  # a coroutine that writes is the other form gRPC takes
        self,
        request_iterator: AsyncIterator[pb.ToSender],
        context: grpc.aio.ServicerContext[pb.ToSender, pb.ToReceiver],
    ) -> None:
        """One stream, opened by the receiver; its end voids every ticket of the pair."""
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                hello = await self._hello(request_iterator)
                pair = await self._connect(hello)
        except Fenced as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TransportError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no handshake within handshake_deadline_s")
        tasks: list[asyncio.Task[None]] = []
        try:
            size = self._staging.size
            welcome = pb.Welcome(sender=self._me.incarnation, transport=pair.transport, max_span_bytes=size)
            await context.write(pb.ToReceiver(welcome=welcome))
            works = (self._read(pair, request_iterator), self._tick(pair, hello.lease_s), self._warm(pair))
            tasks.extend(asyncio.create_task(work) for work in works)
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
        await asyncio.gather(*(self._drop(pair, "the sender is closing") for pair in list(self._pairs.values())))

    def leaks(self) -> list[str]:
        """What is in use, one line each; empty when nothing is being sent."""
        found = [line for pair in self._pairs.values() for line in pair.leaks()]
        if self._staging.used_bytes:
            found.append(f"{self._staging.used_bytes} bytes of the staging are in use")
        if self._thread.open_writes:
            found.append(f"{self._thread.open_writes} writes are under way")
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when the staging or a ticket is inconsistent."""
        self._staging.check_integrity()
        for pair in self._pairs.values():
            pair.check_integrity()

    # --- handshake

    async def _hello(self, messages: AsyncIterator[pb.ToSender]) -> pb.Hello:
        first = await anext(aiter(messages), None)
        if first is None or first.WhichOneof("body") != "hello" or not first.hello.receiver:
            raise Fenced("the first message must be hello, with the receiver's incarnation")
        hello = first.hello
        for name, theirs, ours in (
            ("sender", hello.sender, self._me.incarnation),
            ("layout_digest", hello.layout_digest, self._me.layout.digest()),
            ("model_fingerprint", hello.model_fingerprint, self._me.fingerprint),
        ):
            if theirs != ours:
                hint = "" if name == "sender" else ": model, dtype and draft model must be the same at both ends"
                raise Fenced(f"{name} is {theirs}; this worker's is {ours}{hint}")
        if not 0 < hello.lease_s <= MAX_LEASE_S:
            raise Fenced(f"lease_s is {hello.lease_s:g}; it must be in (0, {MAX_LEASE_S:g}]")
        return hello

    async def _connect(self, hello: pb.Hello) -> OutboundPair:
        """Ends an older pair of this receiver and makes the link. Raises Fenced, TransportError."""
        endpoint = next((offer for offer in hello.endpoints if offer.transport in self._backends), None)
        if endpoint is None or self._closing:
            offers = ", ".join(offer.transport for offer in hello.endpoints) or "nothing"
            speaks = "is closing" if self._closing else f"speaks {', '.join(self._backends)}"
            raise Fenced(f"the receiver offers {offers}; this worker {speaks}")
        backend, peer, metadata = self._backends[endpoint.transport], hello.receiver, endpoint.metadata
        if (old := self._pairs.get(peer)) is not None:
            await self._drop(old, "replaced by a newer stream of the same receiver")

        def connect() -> Link:
            link = backend.link(self._me.incarnation, peer, self._staging.memory)
            try:
                link.connect(metadata)
            except TransportError:
                link.close()
                raise
            return link

        link = await in_thread(connect, lambda link: link.close())
        pair = OutboundPair(self._sender, peer, backend.name, link, hello.slab_bytes)
        if (other := self._pairs.get(peer)) is not None:
            other.shut("replaced by a newer stream of the same receiver")
        self._pairs[peer] = pair
        self._leases.grant(peer, hello.lease_s)
        return pair

    async def _warm(self, pair: OutboundPair) -> None:
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                await pair.warmed.wait()
        except TimeoutError:
            pair.shut("warm-up was not answered within handshake_deadline_s")

    # --- the stream

    async def _read(self, pair: OutboundPair, messages: AsyncIterator[pb.ToSender]) -> None:
        try:
            async for message in messages:
                if not self._leases.renew(pair.peer):
                    return  # `_tick` says so
                pair.on_message(message)
            pair.shut("the receiver ended the stream")
        except grpc.aio.BaseError as error:
            pair.shut(f"the stream broke: {error}")

    async def _tick(self, pair: OutboundPair, lease_s: float) -> None:
        next_ping = self._clock()
        while not self._leases.ran_out(pair.peer):
            if (now := self._clock()) >= next_ping:
                next_ping = now + lease_s / 3
                pair.outbox.put_nowait(pb.ToReceiver(ping=pb.Ping()))
            await asyncio.sleep(min(lease_s / 6, 1.0))
        self._sender.hooks.failed("lease")
        pair.shut(f"the receiver was silent for lease_s = {lease_s:g}")

    async def _drop(self, pair: OutboundPair, reason: str) -> None:
        pair.shut(reason)
        await pair.wait_closed()
        if self._pairs.get(pair.peer) is pair:
            del self._pairs[pair.peer]
            self._leases.drop(pair.peer)
