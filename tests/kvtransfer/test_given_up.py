"""What waits at a sender when nobody wants it any more, or when it cannot be sent: it ends at once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import Buffer, FetchResult, Link, TransportError
from kvtransfer.inbound import PairClient
from tandem.errors import Unavailable
from tandem.kv import Span
from tandem.testing.kv import FakeSink
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import TOKENS, Rig, make_rig

QUIESCE_S = 0.3


async def waiting_export(rig: Rig, client: PairClient) -> asyncio.Task[FetchResult]:
    """A fetch whose first span waits for pages at the source."""
    rig.source.gate.clear()
    fetch = asyncio.create_task(client.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink()))
    await eventually(lambda: any(pair._sender.staging.used_bytes for pair in rig.service._pairs.values()))
    return fetch


async def test_a_cancelled_ticket_quiesces_although_an_export_waits_for_pages() -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected()
        fetch = await waiting_export(rig, client)
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)
        await rig.quiet(client)
        assert not client.closed
        assert (rig.failures, rig.sender_failures) == ([], [])


async def test_a_pair_closes_although_an_export_waits_for_pages() -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected()
        fetch = await waiting_export(rig, client)
        await client.close()
        assert (await fetch).link_failed
        await eventually(lambda: not rig.service._pairs)
        await rig.quiet(client)


async def going_on(rig: Rig, client: PairClient) -> asyncio.Task[FetchResult]:
    """Another fetch of the pair, which waits to be computed while the ticket before it quiesces."""
    rig.source.cached = 0
    other = asyncio.create_task(client.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink()))
    await asyncio.sleep(0)  # its ticket is open
    await eventually(lambda: client.closed or len(client._fetches) == 1)
    assert not client.closed, client.reason
    return other


async def end(rig: Rig, client: PairClient, other: asyncio.Task[FetchResult]) -> None:
    other.cancel()
    await rig.quiet(client)
    assert (client.closed, rig.failures, rig.sender_failures) == (False, [], [])


async def test_a_sender_busy_with_a_step_quiesces_before_it_has_let_go_of_the_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected(quiesce_s=QUIESCE_S)
        ticket, stepped, close = rig.ticket(), asyncio.Event(), rig.source.close

        async def close_behind_the_step(ticket_id: str) -> None:
            await stepped.wait()
            await close(ticket_id)

        monkeypatch.setattr(rig.source, "close", close_behind_the_step)
        assert not (await client.fetch(ticket, TOKENS, "", "", 0, FakeSink())).error
        other = await going_on(rig, client)
        assert any(ticket.ticket_id in line for line in rig.service.leaks())
        stepped.set()
        await end(rig, client, other)


async def test_a_ticket_cancelled_while_the_source_takes_it_quiesces_although_a_step_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected(quiesce_s=QUIESCE_S)
        stepped, asked, take = asyncio.Event(), asyncio.Event(), rig.source.open

        async def take_behind_the_step(*prompt: Any) -> int:
            asked.set()
            try:
                return await take(*prompt)
            finally:
                while not stepped.is_set():  # a call of the engine runs, whoever cancels it
                    with suppress(asyncio.CancelledError):
                        await stepped.wait()

        monkeypatch.setattr(rig.source, "open", take_behind_the_step)
        fetch = asyncio.create_task(client.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink()))
        await asked.wait()
        fetch.cancel()
        monkeypatch.setattr(rig.source, "open", take)
        other = await going_on(rig, client)
        assert not rig.source.closed
        stepped.set()
        await end(rig, client, other)


async def test_what_is_still_gathered_for_a_cancelled_ticket_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected(quiesce_s=QUIESCE_S)
        stepped, export = asyncio.Event(), rig.source.export

        async def export_behind_the_step(ticket_id: str, span: Span, out: Buffer) -> None:
            await stepped.wait()
            rig.source.given_up.clear()  # it had begun
            await export(ticket_id, span, out)

        monkeypatch.setattr(rig.source, "export", export_behind_the_step)
        fetch = asyncio.create_task(client.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink()))
        await eventually(lambda: any(pair._sender.staging.used_bytes for pair in rig.service._pairs.values()))
        fetch.cancel()
        other = await going_on(rig, client)
        stepped.set()
        await eventually(lambda: rig.source.exported and not rig.service._thread.open_writes)
        await end(rig, client, other)
        assert client._arrivals is not None
        assert client._arrivals.late == 0, "a write came behind Quiesced"


class _Dead:
    """A link whose first write fails, as where the network between two hosts is broken."""

    def __init__(self, inner: Link) -> None:
        self.connect, self.poll, self.close = inner.connect, inner.poll, inner.close

    def post(self, view: Buffer, offset: int, manifest: bytes) -> object:
        raise TransportError("no route to the other end")


class _DeadBackend(InprocBackend):
    def link(self, me: str, peer: str, staging: Buffer) -> Link:
        return _Dead(super().link(me, peer, staging))


async def test_a_sender_that_cannot_write_is_heard_before_the_handshakes_deadline() -> None:
    async with make_rig(_DeadBackend()) as rig:
        client = rig.client()
        with pytest.raises(Unavailable, match="no route to the other end"):
            await client.connect()
        await rig.quiet(client)
