"""The sender's end of one pair: tickets, and the writes that their grants allow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvtransfer.base import WARM_TICKET, Buffer, Hooks, Identity, KvSource, Link, TransportError
from kvtransfer.manifest import NO_DIGEST, Manifest
from kvtransfer.sending import Credit, OutboundTicket
from kvtransfer.slab import Staging
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import UNWATCHED, Incarnation, TicketWatch
from tandem.errors import BadRequest, TandemError
from tandem.kv import Span
from tandem.obs import tell_request
from tandem.wire.v1 import handover_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sender:
    """What all pairs of a sender share."""

    me: Identity
    source: KvSource
    staging: Staging
    thread: TransferThread
    hooks: Hooks
    quiesce_s: float
    """A link that takes longer to close is not waited for."""


@dataclass(slots=True)
class _Sending:
    """A ticket, the tasks that write for it, and the event by which its own task hears of changes."""

    state: OutboundTicket
    queue_until: float
    watch: TicketWatch
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    opening: asyncio.Future[int] | None = None
    writes: set[asyncio.Task[None]] = field(default_factory=set)


class OutboundPair:
    """One receiver incarnation. `outbox` holds what the stream must send; None ends the stream.

    Closing voids all tickets: no write starts any more, the link is given up, and each ticket's source is closed. None
    of its tasks is ever cancelled: what they posted must be terminal before they end.
    """

    def __init__(self, sender: Sender, peer: Incarnation, transport: str, link: Link, slab_bytes: int) -> None:
        self._sender, self.peer, self.transport = sender, peer, transport
        self._link, self._slab_bytes = link, slab_bytes
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, _Sending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._link_gone = asyncio.Event()
        self.outbox: asyncio.Queue[pb.ToReceiver | None] = asyncio.Queue()  # bounded by tickets and engine steps
        self.reason = ""
        """Why it was closed."""
        self.warmed = asyncio.Event()

    def on_message(self, message: pb.ToSender) -> None:
        """One message of the receiver."""
        kind = message.WhichOneof("body")
        if self._closing is not None or kind == "ping":
            return
        if kind == "open":
            self._open(message.open)
        elif kind == "grants":
            for grant in message.grants.grants:
                self._grant(grant)
        elif kind == "cancel":
            if (sending := self._tickets.get(message.cancel.ticket_id)) is not None:
                sending.state.cancelled = True
                sending.changed.set()
        elif kind == "warmed":
            self.warmed.set()
        else:
            self.shut(f"the receiver sent {kind or 'an unknown message'} out of turn")

    def shut(self, reason: str) -> None:
        """Closes the pair, once."""
        if self._closing is None:
            log.info("the hand-over to %s is closed: %s", self.peer, reason)
            self.reason = reason
            self._closing = self._loop.create_task(self._close())

    async def wait_closed(self) -> None:
        """After `shut`: waits until no write is under way, the link is gone and every source ticket is closed.

        Where the link cannot be closed its tickets stay as they are: nothing is known of their writes.
        """
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def leaks(self) -> list[str]:
        """Tickets that have not quiesced, one line each."""
        return [
            f"ticket {name} of receiver {self.peer} has not quiesced: token {sending.state.computed} of "
            f"{sending.state.end} is computed, {len(sending.state.sent)} spans are sent"
            for name, sending in self._tickets.items()
        ]

    def check_integrity(self) -> None:
        """Raises AssertionError when a ticket is inconsistent."""
        for sending in self._tickets.values():
            sending.state.check_integrity()

    def _spawn(self, work: Coroutine[None, None, None], among: set[asyncio.Task[None]] | None = None) -> None:
        tasks = self._tasks if among is None else among
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # --- messages

    def _open(self, message: pb.Open) -> None:
        ticket = message.ticket_id
        if ticket in self._tickets:
            log.warning("receiver %s opened ticket %s twice; the second is ignored", self.peer, ticket)
            self._sender.hooks.failed("duplicate_ticket")
            return
        state = OutboundTicket(ticket, message.attempt, len(message.tokens))
        watch, trace = self._sender.hooks.watch, (message.traceparent, message.tracestate)
        told = watch(ticket, *trace) if message.traceparent else UNWATCHED
        self._tickets[ticket] = _Sending(state, self._loop.time() + message.queue_deadline_s, told)
        self._sender.hooks.open_tickets(1)
        self._spawn(self._run(self._tickets[ticket], message))

    def _grant(self, grant: pb.Grant) -> None:
        if grant.ticket_id == WARM_TICKET and not self.warmed.is_set():
            return self._spawn(self._warm_up(grant))
        sending = self._tickets.get(grant.ticket_id)
        if sending is None:
            return None  # it crossed our Quiesced
        credit = Credit(grant.sequence, Span(grant.start, grant.count), grant.offset, grant.length)
        try:
            sending.state.grant(credit, self._sender.me.layout, self._slab_bytes, self._sender.staging.size)
        except ValueError as error:
            self._sender.hooks.failed("bad_grant")
            sending.state.fail(str(error))
        return sending.changed.set()

    async def _warm_up(self, grant: pb.Grant) -> None:
        """Writes what the staging holds of the grant; the receiver answers with Warmed."""
        length = min(grant.length, self._sender.staging.size)
        taken = await self._sender.staging.obtain(length, self, lambda: self._closing is None)
        if taken is None:
            return
        try:
            view = self._sender.staging.view(taken, length)
            manifest = Manifest(WARM_TICKET, 0, 0, 0, 0, length, NO_DIGEST)
            if self._closing is None:
                await self._sender.thread.write(self._link, view, grant.offset, manifest)
        except (TransportError, TandemError) as error:
            self.shut(f"warm-up: {error}")
            await self._link_gone.wait()
        finally:
            self._sender.staging.release(taken)

    # --- one ticket

    async def _run(self, sending: _Sending, message: pb.Open) -> None:
        """From Open to Quiesced, whatever happens in between, and on until the source is closed."""
        state, source = sending.state, self._sender.source
        tell_request(message.request_id, message.traceparent)
        with _failing(state):
            _check(message)
            await self._serve(sending, message)
        if state.stopping and sending.writes:  # what waits for pages or for room must not keep the ticket
            source.give_up(state.ticket_id)
            self._sender.staging.serve()
        while state.writing:
            sending.changed.clear()
            await sending.changed.wait()
        if state.error:
            self._sender.hooks.failed("sender")
        sending.watch.ended(state.error or ("cancelled" if state.cancelled else ""))
        gone = self._closing is not None
        quiesced = pb.Quiesced(
            ticket_id=state.ticket_id, spans_sent=len(state.sent), error=state.error, link_failed=gone
        )
        self.outbox.put_nowait(pb.ToReceiver(quiesced=quiesced))
        # No write begins any more. Gathering and the source may wait for a long step of the engine, the receiver not.
        while sending.writes:
            await asyncio.wait(sending.writes)
        if sending.opening is not None:
            sending.opening.cancel()
            await asyncio.gather(sending.opening, return_exceptions=True)
            with _failing(state):
                await source.close(state.ticket_id)
        del self._tickets[state.ticket_id]
        self._sender.hooks.open_tickets(-1)

    async def _serve(self, sending: _Sending, message: pb.Open) -> None:
        """Opens the source and starts writes until the ticket is over or stops."""
        state, ticket = sending.state, message.ticket_id

        def on_progress(computed: int) -> None:
            self._loop.call_soon_threadsafe(self._progress, sending, computed)

        tokens, root, cached_only = tuple(message.tokens), (message.salt, message.adapter), message.cached_only
        source, priority, tenant = self._sender.source, message.priority, message.tenant
        accepting = source.open(ticket, tokens, *root, priority, on_progress, tenant, cached_only)
        opening = sending.opening = asyncio.ensure_future(accepting)
        opening.add_done_callback(lambda _: sending.changed.set())
        while not opening.done():
            if state.stopping:
                return
            await self._changed(sending)
        cached = opening.result()
        sending.watch.accepted(cached)
        self.outbox.put_nowait(pb.ToReceiver(opened=pb.Opened(ticket_id=ticket, cached_tokens=cached)))
        state.progressed(cached)
        while not (state.stopping or state.over):
            for credit in state.take_sendable():
                self._spawn(self._push(sending, credit), sending.writes)
            await self._changed(sending)

    async def _changed(self, sending: _Sending) -> None:
        """Waits for a change of the ticket, before it has started no longer than its queue deadline."""
        try:
            async with asyncio.timeout_at(None if sending.state.started else sending.queue_until):
                await sending.changed.wait()
        except TimeoutError:
            sending.state.fail("not started within queue_deadline_s")
        sending.changed.clear()

    def _progress(self, sending: _Sending, computed: int) -> None:
        state = sending.state
        if state.progressed(computed) and not state.stopping:  # it may have quiesced
            progress = pb.Progress(ticket_id=state.ticket_id, computed=state.computed)
            self.outbox.put_nowait(pb.ToReceiver(progress=progress))
            sending.changed.set()

    async def _push(self, sending: _Sending, credit: Credit) -> None:
        """Gathers and writes one span. A ticket that quiesced meanwhile does not get it written."""
        state, staging, complete = sending.state, self._sender.staging, False
        taken = await staging.obtain(credit.length, self, lambda: not state.stopping)
        with _failing(state):
            try:
                if taken is not None and not state.stopping:
                    view = staging.view(taken, credit.length)
                    await self._sender.source.export(state.ticket_id, credit.span, view)
                    if state.begin(credit.sequence):
                        sending.watch.wrote(await self._write(state, credit, view), credit.length)
                        complete = True
            except TransportError as error:
                state.fail(str(error))
                self._sender.hooks.failed("transport")
                # Other writes of the link may still be under way: no ticket may quiesce before the link is gone.
                self.shut(str(error))
                await self._link_gone.wait()
            finally:
                if taken is not None:
                    staging.release(taken)
                state.finished(credit.sequence, complete)
                sending.changed.set()

    async def _write(self, state: OutboundTicket, credit: Credit, view: Buffer) -> float:
        span, sender = credit.span, self._sender
        manifest = Manifest(
            state.ticket_id, state.attempt, credit.sequence, span.start, span.count, credit.length, NO_DIGEST
        )
        sender.hooks.pending_sends(1)
        try:
            seconds = await sender.thread.write(self._link, view, credit.offset, manifest)
        finally:
            sender.hooks.pending_sends(-1)
        sender.hooks.moved(self.peer, self.transport, credit.length, seconds)
        return seconds

    async def _close(self) -> None:
        for sending in self._tickets.values():
            sending.state.fail(f"the pair was closed: {self.reason}")
            sending.changed.set()
        self._sender.staging.serve()
        await self._sender.thread.abandon(self._link)
        await asyncio.wait({self._loop.create_task(self._close_link())}, timeout=self._sender.quiesce_s)
        while self._link_gone.is_set() and self._tasks:
            await asyncio.wait(self._tasks)
        self.outbox.put_nowait(None)

    async def _close_link(self) -> None:
        await in_thread(self._link.close)
        self._link_gone.set()


@contextmanager
def _failing(state: OutboundTicket) -> Iterator[None]:
    """What goes wrong fails the ticket."""
    try:
        yield
    except TandemError as error:
        if not state.cancelled:
            state.fail(str(error))
    except Exception:
        log.exception("ticket %s", state.ticket_id)
        state.fail("internal error of the sender")


def _check(message: pb.Open) -> None:
    """Raises BadRequest naming the field."""
    name = message.ticket_id
    if len(name) != 32 or name == WARM_TICKET or any(digit not in "0123456789abcdef" for digit in name):
        raise BadRequest(f"ticket_id is {name!r}; it must be 32 hexadecimal digits")
    if not message.tokens:
        raise BadRequest("tokens is empty; at least 1 token is needed")
