"""What waits at a sender when nobody wants it any more, or when it cannot be sent: it ends at once."""

from __future__ import annotations

import asyncio

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import Buffer, FetchResult, Link, TransportError
from kvtransfer.inbound import PairClient
from tandem.errors import Unavailable
from tandem.testing.kv import FakeSink
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import TOKENS, Rig, make_rig


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
