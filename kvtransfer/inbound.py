"""The receiver: one `PairClient` for each sender incarnation, the client side of `HandOver.Pair`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc.aio

from kvtransfer.arrivals import Arrival, Arrivals, Expected
from kvtransfer.base import MIB, WARM_BYTES, WARM_TICKET, Backend, FetchResult, Hooks, Identity, Landing, SpanSink
from kvtransfer.layout import SLAB_SPANS, ahead, span_limit
from kvtransfer.leases import LeaseTable
from kvtransfer.receiving import InboundTicket
from kvtransfer.slab import Ranges, SlabBudget
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import Incarnation, Ticket
from tandem.errors import BY_GRPC_CODE, Fenced, TandemError, Unavailable
from tandem.types import TokenIds
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InboundSettings:
    """A receiver's settings; names and units are those of `DecodeConfig`."""

    slab_mib: float = 16.0
    span_tokens: int = 256
    lease_s: float = 10.0
    handshake_deadline_s: float = 10.0
    quiesce_s: float = 5.0

    @property
    def slab_bytes(self) -> int:
        """Bytes of one landing slab, a multiple of 4096."""
        return max(4096, int(self.slab_mib * MIB) // 4096 * 4096)


@dataclass(slots=True)
class _Fetch:
    """A ticket and those who wait on it. `arrivals` ends with None when the ticket fails."""

    state: InboundTicket
    arrivals: asyncio.Queue[Arrival | None] = field(default_factory=asyncio.Queue)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    quiesce_by: float = 0.0


class PairClient:
    """Fetches KV from one sender incarnation. `connect` once, `fetch` any number at once, `close` once.

    When the stream breaks, or the peer is silent for a lease, or does not quiesce in time, the pair closes itself: all
    fetches end with an error at once, and the landing is destroyed before its memory is used again. Make a new one then.
    """

    def __init__(
        self,
        me: Identity,
        address: str,
        peer: Incarnation,
        backend: Backend,
        thread: TransferThread,
        budget: SlabBudget,
        settings: InboundSettings,
        hooks: Hooks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me, self._address, self._peer = me, address, peer
        self._backend, self._thread, self._budget, self._settings = backend, thread, budget, settings
        self._hooks, self._clock = hooks or Hooks(), clock
        self._span_tokens = span_limit(me.layout, settings.span_tokens, settings.slab_bytes)
        self._slab = Ranges(settings.slab_bytes)
        self._lease = LeaseTable(clock)
        self._fetches: dict[str, _Fetch] = {}
        self._outbox: asyncio.Queue[pb.ToSender] = asyncio.Queue()  # bounded by tickets and by the slab's ranges
        self._tasks: list[asyncio.Task[None]] = []
        self._warm: asyncio.Future[None] | None = None
        self._landing: Landing | None = None
        self._arrivals: Arrivals | None = None
        self._channel: grpc.aio.Channel | None = None
        self._slab_key: int | None = None
        self._shutting: asyncio.Task[None] | None = None
        self._reason = "not connected"

    @property
    def peer(self) -> Incarnation:
        """The sender's incarnation."""
        return self._peer

    @property
    def connected(self) -> bool:
        """Whether fetches can be made."""
        return not self._reason

    @property
    def closed(self) -> bool:
        """Whether the pair is over for good."""
        return self._shutting is not None

    @property
    def reason(self) -> str:
        """Why it is not connected."""
        return self._reason

    async def connect(self) -> None:
        """Handshake and warm-up. Raises Fenced (another incarnation, layout or model), Overloaded (slab cap), Unavailable."""
        self._slab_key = self._budget.take(self._settings.slab_bytes)
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                await self._handshake()
        except asyncio.CancelledError:
            self._shut("cancelled while connecting")
            raise
        except TandemError as error:
            await self._give_up(str(error))
            raise
        except grpc.aio.AioRpcError as error:
            await self._give_up(error.details() or error.code().name)
            kind = BY_GRPC_CODE.get(error.code().name, Unavailable)
            raise kind(f"hand-over from {self._address}: {self._reason}") from error
        except TimeoutError:
            await self._give_up(f"no handshake within handshake_deadline_s = {self._settings.handshake_deadline_s:g}")
            raise Unavailable(f"hand-over from {self._address}: {self._reason}") from None
        except Exception as error:
            await self._give_up(f"{type(error).__name__}: {error}")
            raise Unavailable(f"hand-over from {self._address}: {self._reason}") from error

    async def fetch(
        self, ticket: Ticket, tokens: TokenIds, salt: str, adapter: str, priority: int, sink: SpanSink, start: int = 0
    ) -> FetchResult:
        """Asks for the KV of `tokens` and lands it in `sink`; never raises but CancelledError.

        start: the first token known to be wanted when asking; `sink.reserve()` has the last word. Cancelling returns at
        once; the ticket's ranges come back in the background, when the sender has quiesced.
        """
        if refusal := self._refusal(ticket, tokens):
            return FetchResult(landed_until=start, error=refusal)
        now = self._clock()
        state = InboundTicket(
            ticket.ticket_id, ticket.attempt, len(tokens), ticket.queue_deadline_s, ticket.transfer_deadline_s, now, start
        )
        fetch = _Fetch(state)
        self._fetches[ticket.ticket_id] = fetch
        self._hooks.open_tickets(1)
        self._send(
            open=pb.Open(
                ticket_id=ticket.ticket_id, request_id=ticket.request_id, attempt=ticket.attempt, tokens=tokens,
                start=start, salt=salt, adapter=adapter, priority=priority, queue_deadline_s=ticket.queue_deadline_s,
            )
        )  # fmt: skip
        try:
            await self._drive(fetch, sink)
        finally:
            self._end(fetch)
        return self._result(state)

    async def close(self) -> None:
        """Ends the pair and waits until the landing is destroyed."""
        self._shut("closed by this end")
        if self._shutting is not None:
            await asyncio.shield(self._shutting)

    def leaks(self) -> list[str]:
        """What is still in use, one line each; empty when the pair is idle or its landing is destroyed."""
        found = [f"ticket {name} is not quiesced" for name in self._fetches]
        if self.closed:
            if self._slab_key is not None:
                found.append("the landing is not closed")
            return found
        if self._slab.used_bytes:
            found.append(f"{self._slab.used_bytes} bytes of the slab are in use")
        if self._arrivals is not None and self._arrivals.outstanding():
            found.append(f"{self._arrivals.outstanding()} grants are in force")
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when slab and tickets disagree."""
        self._slab.check_integrity()
        held = 0
        for fetch in self._fetches.values():
            fetch.state.check_integrity()
            held += sum(taken.size for taken in [*fetch.state.out.values(), *fetch.state.copied.values()])
        assert self.closed or not self.connected or held == self._slab.used_bytes, "a range belongs to no ticket"

    # --- handshake

    async def _handshake(self) -> None:
        loop = asyncio.get_running_loop()
        size = self._settings.slab_bytes
        self._landing = await in_thread(
            lambda: self._backend.landing(self._me.incarnation, self._peer, size), lambda landing: landing.close()
        )

        def arrived(arrival: Arrival) -> None:
            loop.call_soon_threadsafe(self._on_arrival, arrival)

        def broken(reason: str) -> None:
            loop.call_soon_threadsafe(self._shut, reason)

        self._arrivals = Arrivals(self._landing, arrived, broken)
        await self._thread.attach(self._arrivals)
        self._channel = grpc.aio.insecure_channel(self._address)
        call = rpc.HandOverStub(self._channel).Pair()
        await call.write(pb.ToSender(hello=self._hello(self._landing.metadata())))
        welcome = await call.read()
        if welcome is grpc.aio.EOF or welcome.WhichOneof("body") != "welcome":
            raise Unavailable(f"the sender closed the stream: {await call.details() or 'no reason given'}")
        if welcome.welcome.sender != self._peer:
            raise Fenced(f"the sender is {welcome.welcome.sender}; {self._peer} is expected")
        if limit := welcome.welcome.max_span_bytes:
            self._span_tokens = span_limit(self._me.layout, self._span_tokens, size, limit)
        await self._warm_up(min(size, WARM_BYTES, limit or WARM_BYTES))
        self._send(warmed=pb.Warmed())
        self._lease.grant(self._peer, self._settings.lease_s)
        self._reason = ""
        self._tasks = [asyncio.create_task(work) for work in (self._read(call), self._write(call), self._tick())]

    def _hello(self, metadata: bytes) -> pb.Hello:
        return pb.Hello(
            receiver=self._me.incarnation, sender=self._peer, layout_digest=self._me.layout.digest(),
            model_fingerprint=self._me.fingerprint, slab_bytes=self._settings.slab_bytes, lease_s=self._settings.lease_s,
            endpoints=[pb.Endpoint(transport=self._backend.name, metadata=metadata)],
        )  # fmt: skip

    async def _warm_up(self, length: int) -> None:
        """Waits for the sender's first write, at offset 0: connections are made and paths chosen before they count."""
        assert self._arrivals is not None
        self._warm = asyncio.get_running_loop().create_future()
        self._arrivals.expect(Expected(WARM_TICKET, 0, 0, 0, 0, 0, length))
        self._thread.wake()
        await self._warm
        self._arrivals.forget(WARM_TICKET)

    # --- one fetch

    def _refusal(self, ticket: Ticket, tokens: TokenIds) -> str:
        if self._reason:
            return self._reason
        if (ticket.sender, ticket.receiver) != (self._peer, self._me.incarnation):
            return f"ticket {ticket.ticket_id} names another pair of incarnations"
        if ticket.layout_digest != self._me.layout.digest():
            return f"ticket {ticket.ticket_id} names another KV layout"
        if ticket.ticket_id in self._fetches or ticket.ticket_id == WARM_TICKET:
            return f"ticket {ticket.ticket_id} is already in use"
        return "" if tokens else "the prompt is empty"

    async def _drive(self, fetch: _Fetch, sink: SpanSink) -> None:
        state = fetch.state
        first = await self._reserve(fetch, sink)
        if first is None or state.error:
            return
        state.plan(first, self._span_tokens)
        self._pump()
        while not state.complete and not state.error:
            arrival = await fetch.arrivals.get()
            if arrival is None or arrival.data is None or state.error:
                return
            try:
                await sink.land(state.spans[arrival.sequence], arrival.data)
            except Exception as error:  # noqa: BLE001 - the sink's defect ends this ticket only
                log.exception("sink of ticket %s", state.ticket_id)
                return self._fail(fetch, "sink", f"landing failed: {error}")
            if arrival.sequence in state.copied:  # else the pair was closed meanwhile
                self._slab.release(state.landing_done(arrival.sequence))
                self._pump()

    async def _reserve(self, fetch: _Fetch, sink: SpanSink) -> int | None:
        """`sink.reserve()`, unless the ticket fails first."""
        reserving = asyncio.ensure_future(sink.reserve())
        failing = asyncio.ensure_future(fetch.failed.wait())
        try:
            await asyncio.wait({reserving, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not reserving.done():
                return None
            return reserving.result()
        except Exception as error:  # noqa: BLE001 - the sink's defect ends this ticket only
            log.exception("sink of ticket %s", fetch.state.ticket_id)
            self._fail(fetch, "sink", f"reserving failed: {error}")
            return None
        finally:
            reserving.cancel()
            failing.cancel()

    def _pump(self) -> None:
        """Grants what the slab has room for, to the oldest tickets first."""
        if self._reason or self._arrivals is None:
            return
        layout, now, grants = self._me.layout, self._clock(), list[pb.Grant]()
        waiting = [fetch.state for fetch in self._fetches.values() if fetch.state.next_sequence < len(fetch.state.spans)]
        spans = self._slab.size // layout.span_bytes(self._span_tokens)
        limit = ahead(max(SLAB_SPANS, spans), len(waiting))
        for state in waiting:
            while (span := state.next_span(limit)) is not None:
                length = layout.span_bytes(span.count)
                taken = self._slab.allocate(length)
                if taken is None:
                    break
                sequence = state.granted(taken, now)
                self._arrivals.expect(
                    Expected(state.ticket_id, state.attempt, sequence, span.start, span.count, taken.offset, length)
                )
                grants.append(
                    pb.Grant(
                        ticket_id=state.ticket_id, sequence=sequence, start=span.start, count=span.count,
                        offset=taken.offset, length=length,
                    )
                )  # fmt: skip
        if grants:
            self._send(grants=pb.Grants(grants=grants))
            self._thread.wake()

    def _fail(self, fetch: _Fetch, kind: str, error: str) -> None:
        if fetch.state.error or fetch.state.ended:
            return
        fetch.state.fail(kind, error)
        self._wake_failed(fetch)

    def _wake_failed(self, fetch: _Fetch) -> None:
        self._hooks.failed(fetch.state.kind)
        fetch.failed.set()
        fetch.arrivals.put_nowait(None)

    def _end(self, fetch: _Fetch) -> None:
        """The fetch has its result. Its ranges are free once the sender has quiesced, or with the landing."""
        state = fetch.state
        state.ended = True
        if self._reason or state.over:
            self._drop(fetch)
        else:
            fetch.quiesce_by = self._clock() + self._settings.quiesce_s
            if state.needs_cancel:
                self._send(cancel=pb.Cancel(ticket_id=state.ticket_id))
        self._pump()

    def _drop(self, fetch: _Fetch) -> None:
        state = fetch.state
        for taken in state.drain():
            self._slab.release(taken)
        if self._arrivals is not None:
            self._arrivals.forget(state.ticket_id)
        if self._fetches.pop(state.ticket_id, None) is not None:
            self._hooks.open_tickets(-1)

    def _result(self, state: InboundTicket) -> FetchResult:
        size = self._me.layout.span_bytes(state.landed_tokens)
        seconds = self._clock() - state.granted_at if state.granted_at is not None else 0.0
        if size:
            self._hooks.moved(self._peer, self._backend.name, size, seconds)
        return FetchResult(state.landed_until, state.cached, size, seconds, state.error)

    # --- what comes in

    def _on_arrival(self, arrival: Arrival) -> None:
        if arrival.ticket_id == WARM_TICKET:
            if self._warm is not None and not self._warm.done():
                if arrival.fault is None:
                    self._warm.set_result(None)
                else:
                    self._warm.set_exception(Unavailable(f"the warm-up write was wrong: {arrival.fault.value}"))
            return
        fetch = self._fetches.get(arrival.ticket_id)
        if fetch is None or fetch.state.ended:
            return
        if arrival.fault is not None:
            self._fail(fetch, arrival.fault.value, f"span {arrival.sequence} is bad: {arrival.fault.value}")
        else:
            fetch.state.arrived(arrival.sequence, self._clock())
            fetch.arrivals.put_nowait(arrival)

    def _on_message(self, message: pb.ToReceiver) -> None:
        kind = message.WhichOneof("body")
        if kind == "opened":
            if (fetch := self._fetches.get(message.opened.ticket_id)) is not None:
                fetch.state.cached = message.opened.cached_tokens
                fetch.state.progressed(message.opened.cached_tokens, self._clock())
                self._pump()
        elif kind == "progress":
            if (fetch := self._fetches.get(message.progress.ticket_id)) is not None:
                fetch.state.progressed(message.progress.computed, self._clock())
                self._pump()
        elif kind == "quiesced":
            if (fetch := self._fetches.get(message.quiesced.ticket_id)) is not None:
                self._on_quiesced(fetch, message.quiesced)
        elif kind != "ping":
            self._shut(f"the sender sent {kind or 'an unknown message'} out of turn")

    def _on_quiesced(self, fetch: _Fetch, message: pb.Quiesced) -> None:
        state = fetch.state
        had_error = bool(state.error)
        for taken in state.quiesced(message.spans_sent, message.error):
            self._slab.release(taken)
        if state.error and not had_error:
            self._wake_failed(fetch)
        if state.ended:
            self._drop(fetch)
            self._pump()

    # --- the stream

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.ToSender, pb.ToReceiver]) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if not self._lease.renew(self._peer):
                    return self._shut("the sender was silent for longer than lease_s")
                self._on_message(message)
            self._shut("the sender ended the stream")
        except grpc.aio.AioRpcError as error:
            self._shut(f"the stream broke: {error.details() or error.code().name}")

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.ToSender, pb.ToReceiver]) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._shut(f"the stream broke: {error}")
        finally:
            call.cancel()

    async def _tick(self) -> None:
        """Pings, and gives up what is silent or late."""
        lease = self._settings.lease_s
        next_ping = self._clock() + lease / 3
        while True:
            await asyncio.sleep(min(lease / 6, 0.1))
            now = self._clock()
            if self._lease.expired():
                return self._shut(f"the sender was silent for lease_s = {lease:g}")
            if now >= next_ping:
                next_ping = now + lease / 3
                self._send(ping=pb.Ping())
            for fetch in list(self._fetches.values()):
                if fetch.state.ended and now > fetch.quiesce_by:
                    self._hooks.failed("quiesce_deadline")
                    return self._shut(f"a ticket did not quiesce within quiesce_s = {self._settings.quiesce_s:g}")
                if late := fetch.state.expired(now):
                    self._fail(fetch, *late)

    def _send(self, **body: object) -> None:
        self._outbox.put_nowait(pb.ToSender(**body))  # type: ignore[arg-type]

    # --- the end

    async def _give_up(self, reason: str) -> None:
        self._shut(reason)
        if self._shutting is not None:
            await asyncio.shield(self._shutting)

    def _shut(self, reason: str) -> None:
        """Closes the pair once: fetches end now, the landing off the loop."""
        if self._shutting is not None:
            return
        self._reason = reason
        self._shutting = asyncio.get_running_loop().create_task(self._destroy())
        if self._warm is not None and not self._warm.done():
            self._warm.set_exception(Unavailable(reason))
        for fetch in list(self._fetches.values()):
            if fetch.state.ended:
                self._drop(fetch)
            else:
                self._fail(fetch, "pair", f"the pair is closed: {reason}")

    async def _destroy(self) -> None:
        size, key = self._settings.slab_bytes, self._slab_key
        if key is not None:
            self._budget.quarantine(key)
            self._hooks.quarantined(size)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
        if self._arrivals is not None:
            await self._thread.detach(self._arrivals)
        if self._landing is not None:
            await in_thread(self._landing.close)
        if key is not None:
            self._budget.release(key)
            self._hooks.quarantined(-size)
            self._slab_key = None
