"""The receiver: one `PairClient` for each sender incarnation, the client side of `HandOver.Pair`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import grpc.aio

from kvtransfer.arrivals import Arrival, Arrivals, Expected, Fault
from kvtransfer.base import MIB, WARM_BYTES, WARM_TICKET, Backend, FetchResult, Hooks, Identity, Landing, SpanSink
from kvtransfer.layout import ahead, ahead_together, span_limit
from kvtransfer.leases import LeaseTable
from kvtransfer.receiving import InboundTicket
from kvtransfer.slab import Range, Ranges, SlabBudget
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import Incarnation, Ticket
from tandem.config import WorkerConfig
from tandem.errors import BY_GRPC_CODE, Fenced, TandemError, Unavailable
from tandem.kv import Span
from tandem.trust import ANYONE, Trust
from tandem.types import TokenIds
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc

log = logging.getLogger(__name__)

LINK_FAILURES = frozenset({"pair", "link", "transfer_deadline", *(fault.value for fault in Fault)})
"""Kinds of failures that are the way's, and neither end's own."""

_Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.ToSender, pb.ToReceiver]"


@dataclass(frozen=True, slots=True)
class InboundSettings:
    """A receiver's settings; names and units are those of `WorkerConfig`."""

    slab_mib: float = 16.0
    span_tokens: int = 256
    lease_s: float = 10.0
    handshake_deadline_s: float = 10.0
    quiesce_s: float = 5.0
    trust: Trust = ANYONE
    warm_bytes: int = WARM_BYTES
    warm_writes: int = 1

    @classmethod
    def of(cls, config: WorkerConfig) -> InboundSettings:
        """Those of a worker."""
        seconds = config.lease_s, config.handshake_deadline_s, config.quiesce_s
        return cls(config.slab_mib, config.span_tokens, *seconds, Trust.of(config))

    @property
    def slab_bytes(self) -> int:
        """Bytes of one landing slab, a multiple of 4096."""
        return max(4096, int(self.slab_mib * MIB) // 4096 * 4096)


@dataclass(slots=True)
class _Fetch:
    """A ticket and what its fetch hears of: `sink.reserve()` is done, a span has arrived, or None: it has failed."""

    state: InboundTicket
    events: asyncio.Queue[Arrival | asyncio.Future[int | None] | None] = field(default_factory=asyncio.Queue)
    quiesce_by: float = 0.0


class PairClient:
    """Fetches KV from one sender incarnation. `connect` once, `fetch` any number at once, `close` once.

    When the stream breaks, or the peer is silent for a lease or does not quiesce in time, the pair closes itself: all
    fetches end with an error at once, and the landing is destroyed before its memory is used again. Then make a new
    one. Close pairs before the transfer thread.
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
        self.peer, self._me, self._address, self._backend = peer, me, address, backend
        self._thread, self._budget, self._settings = thread, budget, settings
        self._hooks, self._clock, self._lease = hooks or Hooks(), clock, LeaseTable(clock)
        self._span_tokens = span_limit(me.layout, settings.span_tokens, settings.slab_bytes)
        self._slab = Ranges(settings.slab_bytes)
        self._fetches: dict[str, _Fetch] = {}
        self._outbox: asyncio.Queue[pb.ToSender] = asyncio.Queue()  # bounded by tickets and by the slab's ranges
        self._tasks: list[asyncio.Task[None]] = []
        self._warm: asyncio.Future[None] | None = None
        self._landing: Landing | None = None
        self._arrivals: Arrivals | None = None
        self._channel: grpc.aio.Channel | None = None
        self._slab_key: int | None = None
        self._shutting: asyncio.Task[None] | None = None
        self.transport, self.warm_bytes, self.warm_s = backend.name, 0, list[float]()
        """Of the warm-up writes: what they went over, bytes of one, and how long each took."""
        self.reason = "not connected"
        """Why no fetch can be made; empty while the pair is connected."""

    @property
    def closed(self) -> bool:
        """Whether the pair is over for good."""
        return self._shutting is not None

    async def connect(self) -> None:
        """Handshake and warm-up. Raises Fenced (incarnation, layout or model differs), Overloaded, Unavailable."""
        self._slab_key = self._budget.take(self._settings.slab_bytes)
        try:
            async with asyncio.timeout(self._settings.handshake_deadline_s):
                await self._handshake()
        except asyncio.CancelledError:
            self._shut("cancelled while connecting")
            raise
        except Exception as cause:
            error = self._explain(cause)
            self._shut(str(error))
            await self.close()
            raise error from cause

    async def fetch(
        self,
        ticket: Ticket,
        tokens: TokenIds,
        salt: str,
        adapter: str,
        priority: int,
        sink: SpanSink,
        start: int = 0,
        cached_only: bool = False,
    ) -> FetchResult:
        """Asks for the KV of `tokens` and lands it in `sink`; raises nothing but CancelledError.

        start: the first token known to be wanted when asking; `sink.reserve()` has the last word. cached_only: the
        sender is to compute nothing. Cancelling returns at once; the ticket's ranges come back in the background, when
        the sender has quiesced.
        """
        if refusal := self._refusal(ticket, tokens):
            return FetchResult(landed_until=start, error=refusal, link_failed=bool(self.reason))
        name, queue_s = ticket.ticket_id, ticket.queue_deadline_s
        state = InboundTicket(
            name, ticket.attempt, len(tokens), queue_s, ticket.transfer_deadline_s, self._clock(), first=start
        )
        fetch = self._fetches[name] = _Fetch(state)
        self._hooks.open_tickets(1)
        self._send(
            open=pb.Open(
                ticket_id=name, request_id=ticket.request_id, attempt=ticket.attempt, tokens=tokens, start=start,
                salt=salt, adapter=adapter, priority=priority, queue_deadline_s=queue_s, tenant=ticket.tenant,
                cached_only=cached_only, traceparent=ticket.traceparent, tracestate=ticket.tracestate,
            )
        )  # fmt: skip
        try:
            await self._drive(fetch, sink)
        finally:
            self._end(fetch)
        size = sum(self._bytes(state, span) for span in state.landed_spans)
        seconds = self._clock() - state.granted_at if state.granted_at is not None else 0.0
        if size:
            self._hooks.moved(self.peer, self._backend.name, size, seconds)
        arrived, broken = state.progress_at * bool(size), bool(state.error) and state.kind in LINK_FAILURES
        return FetchResult(state.landed_until, state.cached, size, seconds, state.error, arrived, broken)

    async def close(self) -> None:
        """Ends the pair and waits until the landing is destroyed.

        One whose destruction hangs is waited for as long as a ticket would be: its slab stays quarantined, and nobody
        else need hang.
        """
        self._shut("closed by this end")
        if self._shutting is not None:
            done, _ = await asyncio.wait({self._shutting}, timeout=self._settings.quiesce_s)
            for destroyed in done:
                destroyed.result()

    def leaks(self) -> list[str]:
        """What is still in use, one line each; empty when the pair is idle or its landing is destroyed."""
        found = [
            f"ticket {name} of sender {self.peer} is not quiesced: {len(fetch.state.landed)} of "
            f"{len(fetch.state.spans or ())} spans have landed"
            for name, fetch in self._fetches.items()
        ]
        if self._slab.used_bytes:
            found.append(f"{self._slab.used_bytes} bytes of the slab are in use")
        if self._arrivals is not None and self._arrivals.outstanding:
            found.append(f"{self._arrivals.outstanding} grants are in force")
        if self.closed and self._slab_key is not None:
            found.append("the landing is not closed")
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when slab and tickets disagree."""
        self._slab.check_integrity()
        held = 0
        for fetch in self._fetches.values():
            fetch.state.check_integrity()
            held += sum(taken.size for taken in [*fetch.state.out.values(), *fetch.state.copied.values()])
        assert held == self._slab.used_bytes, "a range belongs to no ticket"

    # --- handshake

    async def _handshake(self) -> None:
        me, size, loop = self._me, self._settings.slab_bytes, asyncio.get_running_loop()
        self._landing = await in_thread(
            lambda: self._backend.landing(me.incarnation, self.peer, size), lambda landing: landing.close()
        )
        self._arrivals = Arrivals(
            self._landing,
            lambda arrival: loop.call_soon_threadsafe(self._on_arrival, arrival),
            lambda reason: loop.call_soon_threadsafe(self._shut, reason),
        )
        await self._thread.attach(self._arrivals)
        self._channel = self._settings.trust.channel(self._address)
        call = rpc.HandOverStub(self._channel).Pair()
        hello = pb.Hello(
            receiver=me.incarnation, sender=self.peer, layout_digest=me.layout.digest(),
            model_fingerprint=me.fingerprint, slab_bytes=size, lease_s=self._settings.lease_s,
            endpoints=[pb.Endpoint(transport=self._backend.name, metadata=self._landing.metadata())],
        )  # fmt: skip
        await call.write(pb.ToSender(hello=hello))
        message = await call.read()
        if not isinstance(message, pb.ToReceiver) or message.WhichOneof("body") != "welcome":
            raise Unavailable(f"{self._address} did not answer with welcome")
        if (sender := message.welcome.sender) != self.peer:
            raise Fenced(f"the sender is {sender}; {self.peer} is expected")
        limit = message.welcome.max_span_bytes
        self._span_tokens = span_limit(me.layout, self._settings.span_tokens, size, limit)
        self.warm_bytes = min(size, self._settings.warm_bytes, limit)
        self._lease.grant(self.peer, self._settings.lease_s)
        self._tasks = [asyncio.create_task(self._read(call))]  # from now on: a sender that fails says so at once
        for _ in range(self._settings.warm_writes):
            self.warm_s.append(await self._warm_write(call, self.warm_bytes))
        await call.write(pb.ToSender(warmed=pb.Warmed()))
        if self.closed:
            raise Unavailable(self.reason)
        self.reason = ""
        self._tasks += [asyncio.create_task(self._write(call)), asyncio.create_task(self._tick())]

    async def _warm_write(self, call: _Call, length: int) -> float:
        """Grants the start of the slab, waits for the write, and says how long it took: connections are made by it."""
        assert self._arrivals is not None
        if self.closed:
            raise Unavailable(self.reason)
        self._warm, started = asyncio.get_running_loop().create_future(), self._clock()
        self._arrivals.expect(Expected(WARM_TICKET, 0, 0, 0, 0, 0, length))
        self._thread.wake()
        await call.write(pb.ToSender(grants=pb.Grants(grants=[pb.Grant(ticket_id=WARM_TICKET, length=length)])))
        await self._warm
        self._arrivals.forget(WARM_TICKET)
        return self._clock() - started

    def _explain(self, cause: Exception) -> TandemError:
        if isinstance(cause, TandemError):
            return cause
        kind: type[TandemError] = Unavailable
        text = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, grpc.aio.AioRpcError):
            kind = BY_GRPC_CODE.get(cause.code().name, Unavailable)
            text = cause.details() or cause.code().name
        elif isinstance(cause, TimeoutError):
            text = f"no handshake within handshake_deadline_s = {self._settings.handshake_deadline_s:g}"
        return kind(f"hand-over from {self._address}: {text}")

    # --- one fetch

    def _refusal(self, ticket: Ticket, tokens: TokenIds) -> str:
        if self.reason:
            return self.reason
        if (ticket.sender, ticket.receiver) != (self.peer, self._me.incarnation):
            return f"ticket {ticket.ticket_id} names another pair of incarnations"
        if ticket.layout_digest != self._me.layout.digest():
            return f"ticket {ticket.ticket_id} names another KV layout"
        if ticket.ticket_id in self._fetches or ticket.ticket_id == WARM_TICKET:
            return f"ticket {ticket.ticket_id} is already in use"
        return "" if tokens else "the prompt is empty"

    async def _drive(self, fetch: _Fetch, sink: SpanSink) -> None:
        state, arrivals = fetch.state, self._arrivals
        assert arrivals is not None
        reserving = asyncio.ensure_future(sink.reserve())
        reserving.add_done_callback(fetch.events.put_nowait)
        try:
            while not state.complete:
                event = await fetch.events.get()
                if state.error or event is None:
                    return
                if not isinstance(event, Arrival):
                    if (first := event.result()) is None:
                        return
                    state.plan(max(first, self._me.layout.moved_from(state.end)), self._span_tokens)
                elif not isinstance(event.outcome, Fault) and state.spans is not None:
                    await sink.land(state.spans[event.sequence], event.outcome)
                    arrivals.recycle(event.outcome)
                    if event.sequence in state.copied:  # else the pair was closed meanwhile
                        self._slab.release(state.land(event.sequence))
                self._pump()
        except Exception as error:
            log.exception("the sink of ticket %s", state.ticket_id)
            self._fail(fetch, "sink", f"landing failed: {error}")
        finally:
            reserving.cancel()

    def _pump(self) -> None:
        """Grants what the slab has room for, oldest tickets first: all that is computed, then some ahead of it."""
        if self.reason:
            return
        states = [fetch.state for fetch in self._fetches.values()]
        tickets = [state for state in states if not state.ended]
        grants = [grant for state in tickets for grant in self._grants(state, 0)]
        spans = self._slab.size // (self._me.layout.token_bytes * self._span_tokens)
        limit, room = ahead(spans, len(tickets)), ahead_together(spans) - sum(state.ahead for state in states)
        early = (grant for state in tickets for grant in self._grants(state, limit))
        grants += islice(early, max(0, room))
        if grants:
            self._send(grants=pb.Grants(grants=grants))
            self._thread.wake()

    def _grants(self, state: InboundTicket, limit: int) -> Iterator[pb.Grant]:
        """Grants of a ticket's next spans, one for each that is asked for, while limit and slab last."""
        while (span := state.next_span(limit)) is not None:
            if (taken := self._slab.allocate(self._bytes(state, span))) is None:
                return
            yield self._grant(state, span, taken)

    def _bytes(self, state: InboundTicket, span: Span) -> int:
        return self._me.layout.span_bytes(span, state.end)

    def _grant(self, state: InboundTicket, span: Span, taken: Range) -> pb.Grant:
        assert self._arrivals is not None
        name, sequence = state.ticket_id, state.grant(taken, self._clock())
        length = self._bytes(state, span)
        self._arrivals.expect(Expected(name, state.attempt, sequence, span.start, span.count, taken.offset, length))
        return pb.Grant(
            ticket_id=name, sequence=sequence, start=span.start, count=span.count, offset=taken.offset, length=length
        )

    def _fail(self, fetch: _Fetch, kind: str, error: str) -> None:
        if fetch.state.fail(kind, error):
            self._hooks.failed(kind)
            fetch.events.put_nowait(None)

    def _end(self, fetch: _Fetch) -> None:
        """The fetch has its result. Its ranges are free once the sender has quiesced, or with the landing."""
        state = fetch.state
        state.ended = True
        if self.closed or state.sent is not None:
            self._drop(fetch)
        else:
            fetch.quiesce_by = self._clock() + self._settings.quiesce_s
            if state.needs_cancel:
                self._send(cancel=pb.Cancel(ticket_id=state.ticket_id))

    def _drop(self, fetch: _Fetch) -> None:
        """Nobody writes for this ticket any more."""
        for taken in fetch.state.drain():
            self._slab.release(taken)
        if self._arrivals is not None:
            self._arrivals.forget(fetch.state.ticket_id)
        if self._fetches.pop(fetch.state.ticket_id, None) is not None:
            self._hooks.open_tickets(-1)
        self._pump()

    # --- what comes in

    def _on_arrival(self, arrival: Arrival) -> None:
        bad = f"span {arrival.sequence} is bad: {arrival.outcome.value}" if isinstance(arrival.outcome, Fault) else ""
        if arrival.ticket_id == WARM_TICKET:
            if bad:
                self._shut(bad)
            elif self._warm is not None and not self._warm.done():
                self._warm.set_result(None)
            return
        fetch = self._fetches.get(arrival.ticket_id)
        if fetch is None or fetch.state.ended:
            return
        if isinstance(arrival.outcome, Fault):
            self._fail(fetch, arrival.outcome.value, bad)
        else:
            fetch.state.arrived(arrival.sequence, self._clock())
            fetch.events.put_nowait(arrival)

    def _on_message(self, message: pb.ToReceiver) -> None:
        kind = message.WhichOneof("body")
        if kind == "opened" and (fetch := self._fetches.get(message.opened.ticket_id)) is not None:
            fetch.state.cached = message.opened.cached_tokens
            fetch.state.progressed(message.opened.cached_tokens, self._clock())
        elif kind == "progress" and (fetch := self._fetches.get(message.progress.ticket_id)) is not None:
            fetch.state.progressed(message.progress.computed, self._clock())
        elif kind == "quiesced" and (fetch := self._fetches.get(message.quiesced.ticket_id)) is not None:
            last = message.quiesced
            if fetch.state.quiesced(last.spans_sent, last.error, last.link_failed):
                self._hooks.failed(fetch.state.kind)
                fetch.events.put_nowait(None)
            if fetch.state.ended:
                self._drop(fetch)
        elif kind in (None, "welcome"):
            self._shut(f"the sender sent {kind or 'an unknown message'} out of turn")
        self._pump()

    # --- the stream

    async def _read(self, call: _Call) -> None:
        try:
            while isinstance(message := await call.read(), pb.ToReceiver) and self._lease.renew(self.peer):
                self._on_message(message)
            if not self._lease.ran_out(self.peer):  # else `_tick` says so
                self._shut("the sender ended the stream")
        except grpc.aio.AioRpcError as error:
            self._shut(f"the stream broke: {error.details() or error.code().name}")

    async def _write(self, call: _Call) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader says why the stream ended
        finally:
            call.cancel()

    async def _tick(self) -> None:
        """Pings, and gives up what is silent or late."""
        lease = self._settings.lease_s
        next_ping = self._clock()
        while not self._lease.ran_out(self.peer):
            if (now := self._clock()) >= next_ping:
                next_ping = now + lease / 3
                self._send(ping=pb.Ping())
            for fetch in list(self._fetches.values()):
                if fetch.state.ended and now > fetch.quiesce_by:
                    self._hooks.failed("quiesce_deadline")
                    return self._shut(f"a ticket did not quiesce within quiesce_s = {self._settings.quiesce_s:g}")
                if late := fetch.state.expired(now):
                    self._fail(fetch, *late)
            await asyncio.sleep(min(lease / 6, 0.1))
        self._hooks.failed("lease")
        return self._shut(f"the sender was silent for lease_s = {lease:g}")

    def _send(self, **body: object) -> None:
        self._outbox.put_nowait(pb.ToSender(**body))  # type: ignore[arg-type]

    # --- the end

    def _shut(self, reason: str) -> None:
        """Closes the pair once: fetches end now, the landing off the loop."""
        if self.closed:
            return
        log.info("the hand-over from %s is closed: %s", self.peer, reason)
        self.reason = reason
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
        # They know the pair: without them it goes at once, and does not wait for Python's collector.
        self._tasks, self._slab_key, self._landing, self._arrivals, self._channel = [], None, None, None, None
