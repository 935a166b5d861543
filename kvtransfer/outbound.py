"""The sender's end of one pair: tickets, and the writes that their grants allow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field

from kvtransfer.base import WARM_BYTES, WARM_TICKET, Hooks, Identity, KvSource, Link, TransportError
from kvtransfer.manifest import Manifest
from kvtransfer.sending import Credit, OutboundTicket
from kvtransfer.slab import Staging
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.cluster import Incarnation
from tandem.errors import TandemError
from tandem.kv import Span
from tandem.wire.v1 import handover_pb2 as pb

log = logging.getLogger(__name__)

_NO_DIGEST = bytes(16)


@dataclass(slots=True)
class _Sending:
    """A ticket, the tasks that write for it, and the event by which its own task hears of changes."""

    state: OutboundTicket
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    writes: set[asyncio.Task[None]] = field(default_factory=set)


class OutboundPair:
    """One receiver incarnation. `outbox` holds what the stream must send; None ends the stream.

    Closing voids all tickets: no write starts any more, the link is given up, and each ticket's source is closed.
    """

    def __init__(
        self,
        me: Identity,
        peer: Incarnation,
        transport: str,
        link: Link,
        slab_bytes: int,
        staging: Staging,
        thread: TransferThread,
        source: KvSource,
        hooks: Hooks,
    ) -> None:
        self._me, self.peer, self._transport = me, peer, transport
        self._link, self._slab_bytes, self._staging = link, slab_bytes, staging
        self._thread, self._source, self._hooks = thread, source, hooks
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, _Sending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._link_gone = asyncio.Event()
        self.outbox: asyncio.Queue[pb.ToReceiver | None] = asyncio.Queue()  # bounded by tickets and engine steps
        self.reason = ""
        """Why it was closed."""
        self.warmed = asyncio.Event()

    def warm_up(self) -> None:
        """Starts to write to the beginning of the slab, which nobody uses yet; the receiver answers with Warmed."""
        self._spawn(self._warm_up())

    def on_message(self, message: pb.ToSender) -> None:
        """One message of the receiver."""
        kind = message.WhichOneof("body")
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
        elif kind != "ping":
            self.shut(f"the receiver sent {kind or 'an unknown message'} out of turn")

    def shut(self, reason: str) -> None:
        """Closes the pair, once."""
        if self._closing is None:
            self.reason = reason
            self._closing = self._loop.create_task(self._close())

    async def wait_closed(self) -> None:
        """Waits until no write is under way, the link is gone and every source ticket is closed. Call `shut` first."""
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def ping(self) -> None:
        """Renews the lease at the receiver."""
        self.outbox.put_nowait(pb.ToReceiver(ping=pb.Ping()))

    def leaks(self) -> list[str]:
        """Tickets that have not quiesced, one line each."""
        return [f"ticket {name} of receiver {self.peer} has not quiesced" for name in self._tickets]

    def check_integrity(self) -> None:
        """Raises AssertionError when a ticket is inconsistent."""
        for sending in self._tickets.values():
            sending.state.check_integrity()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Runs a task that is never cancelled: what it posted must be terminal before it ends."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warm_up(self) -> None:
        length = min(self._slab_bytes, WARM_BYTES, self._staging.size)
        taken = await self._staging.obtain(length)
        try:
            if self._closing is None:
                view = self._staging.view(taken, length)
                await self._thread.write(self._link, view, 0, Manifest(WARM_TICKET, 0, 0, 0, 0, length, _NO_DIGEST))
        except TransportError as error:
            self.shut(f"warm-up: {error}")
            await self._link_gone.wait()
        finally:
            self._staging.release(taken)

    # --- messages

    def _open(self, message: pb.Open) -> None:
        ticket = message.ticket_id
        if ticket in self._tickets:
            log.warning("receiver %s opened ticket %s twice; the second is ignored", self.peer, ticket)
            self._hooks.failed("duplicate_ticket")
            return
        sending = _Sending(OutboundTicket(ticket, message.attempt, len(message.tokens)))
        self._tickets[ticket] = sending
        self._hooks.open_tickets(1)
        if not _is_ticket(ticket) or not message.tokens or self._closing is not None:
            sending.state.fail("ticket_id must be 32 hexadecimal digits" if message.tokens else "tokens is empty")
        self._spawn(self._run(sending, message))

    def _grant(self, grant: pb.Grant) -> None:
        sending = self._tickets.get(grant.ticket_id)
        if sending is None:
            return  # it crossed our Quiesced
        credit = Credit(grant.sequence, Span(grant.start, grant.count), grant.offset, grant.length)
        try:
            sending.state.grant(credit, self._me.layout, self._slab_bytes, self._staging.size)
        except ValueError as error:
            self._hooks.failed("bad_grant")
            sending.state.fail(str(error))
        sending.changed.set()

    # --- one ticket

    async def _run(self, sending: _Sending, message: pb.Open) -> None:
        state = sending.state
        opened = False
        try:
            if not state.stopping:
                opened = True
                await self._serve(sending, message)
        except TandemError as error:
            state.fail(str(error))
        except Exception:
            log.exception("ticket %s", state.ticket_id)
            state.fail("internal error of the sender")
        finally:
            while sending.writes:
                await asyncio.wait(sending.writes)
            if opened:
                await self._close_source(state.ticket_id)
            if state.error:
                self._hooks.failed("sender")
            del self._tickets[state.ticket_id]
            self._hooks.open_tickets(-1)
            quiesced = pb.Quiesced(ticket_id=state.ticket_id, spans_sent=len(state.sent), error=state.error)
            self.outbox.put_nowait(pb.ToReceiver(quiesced=quiesced))

    async def _serve(self, sending: _Sending, message: pb.Open) -> None:
        """Opens the source and starts writes until the ticket is over."""
        state, ticket = sending.state, message.ticket_id

        def on_progress(computed: int) -> None:
            self._loop.call_soon_threadsafe(self._progress, sending, computed)

        opening = asyncio.ensure_future(
            self._source.open(
                ticket, tuple(message.tokens), message.salt, message.adapter, message.priority, on_progress
            )
        )
        while not opening.done() and not state.stopping:
            await self._changed(sending, opening)
        if not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        if opening.cancelled():
            return
        cached = opening.result()
        self.outbox.put_nowait(pb.ToReceiver(opened=pb.Opened(ticket_id=ticket, cached_tokens=cached)))
        state.progressed(cached)
        deadline = self._loop.time() + message.queue_deadline_s
        while True:
            for credit in state.take_sendable():
                task = self._loop.create_task(self._push(sending, credit))
                sending.writes.add(task)
                task.add_done_callback(sending.writes.discard)
            if state.over:
                return
            try:
                async with asyncio.timeout_at(None if state.started else deadline):
                    await self._changed(sending)
            except TimeoutError:
                state.fail(f"not started within queue_deadline_s = {message.queue_deadline_s:g}")

    async def _changed(self, sending: _Sending, *others: asyncio.Future[int]) -> None:
        """Waits for a change of the ticket, or for one of `others`."""
        if others:
            waiting = asyncio.ensure_future(sending.changed.wait())
            await asyncio.wait({waiting, *others}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        else:
            await sending.changed.wait()
        sending.changed.clear()

    def _progress(self, sending: _Sending, computed: int) -> None:
        if sending.state.progressed(computed) and sending.state.ticket_id in self._tickets:
            progress = pb.Progress(ticket_id=sending.state.ticket_id, computed=sending.state.computed)
            self.outbox.put_nowait(pb.ToReceiver(progress=progress))
            sending.changed.set()

    async def _push(self, sending: _Sending, credit: Credit) -> None:
        """Gathers and writes one span. The ticket cannot quiesce before this returned."""
        state, complete = sending.state, False
        taken = await self._staging.obtain(credit.length)
        try:
            if state.stopping:
                return
            view = self._staging.view(taken, credit.length)
            await self._source.export(state.ticket_id, credit.span, view)
            if state.stopping:
                return
            span = credit.span
            manifest = Manifest(
                state.ticket_id, state.attempt, credit.sequence, span.start, span.count, credit.length, _NO_DIGEST
            )
            self._hooks.pending_sends(1)
            try:
                seconds = await self._thread.write(self._link, view, credit.offset, manifest)
            finally:
                self._hooks.pending_sends(-1)
            complete = True
            self._hooks.moved(self.peer, self._transport, credit.length, seconds)
        except TransportError as error:
            self._hooks.failed("transport")
            state.fail(str(error))
            self.shut(str(error))
            # Other writes of the link may still be under way; this ticket may quiesce only once the link is gone.
            await self._link_gone.wait()
        except TandemError as error:
            state.fail(str(error))
        except Exception:
            log.exception("span %d of ticket %s", credit.sequence, state.ticket_id)
            state.fail("internal error of the sender")
        finally:
            self._staging.release(taken)
            state.finished(credit.sequence, complete)
            sending.changed.set()

    async def _close_source(self, ticket: str) -> None:
        try:
            await self._source.close(ticket)
        except Exception:
            log.exception("closing ticket %s at the source", ticket)

    async def _close(self) -> None:
        for sending in self._tickets.values():
            sending.state.fail(f"the pair was closed: {self.reason}")
            sending.changed.set()
        await self._thread.abandon(self._link)
        await in_thread(self._link.close)
        self._link_gone.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self.outbox.put_nowait(None)


def _is_ticket(name: str) -> bool:
    return len(name) == 32 and all(digit in "0123456789abcdef" for digit in name) and name != WARM_TICKET
