"""A transport whose end hangs when it is destroyed: what it had stays quarantined, and nobody waits for it for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import Buffer, Landing, Link
from kvtransfer.pairs import PairPool, Target
from tandem.cluster import new_id
from tandem.errors import Fenced
from tandem.testing.kv import FakeSink
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import SETTINGS, TOKENS, Rig, make_rig


class _Hanging(InprocBackend):
    """Landings, or links, cannot be closed until `free` is set."""

    def __init__(self, landings: bool = False, links: bool = False) -> None:
        super().__init__()
        self.free, self._hang_landings, self._hang_links = threading.Event(), landings, links

    def landing(self, me: str, peer: str, slab_bytes: int) -> Landing:
        landing = super().landing(me, peer, slab_bytes)
        if self._hang_landings:
            self._hang(landing)
        return landing

    def link(self, me: str, peer: str, staging: Buffer) -> Link:
        link = super().link(me, peer, staging)
        if self._hang_links:
            self._hang(link)
        return link

    def _hang(self, end: Any) -> None:
        close = end.close

        def wait_and_close() -> None:
            self.free.wait()
            close()

        end.close = wait_and_close


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    backend = _Hanging(landings=True)
    async with make_rig(backend, replace(SETTINGS, quiesce_s=0.2)) as rig:
        yield rig
        backend.free.set()
        await eventually(lambda: rig.budget.used_bytes == 0)


def pool_of(rig: Rig) -> PairPool:
    return PairPool(lambda incarnation, _: rig.client(peer=incarnation))


async def test_a_request_hears_of_a_refusal_although_the_landing_hangs(rig: Rig) -> None:
    pool = pool_of(rig)
    async with asyncio.timeout(5.0):
        with pytest.raises(Fenced, match="sender is"):
            await pool.pair(Target(new_id(), rig.address))
    assert rig.budget.quarantined_bytes == SETTINGS.slab_bytes
    assert pool.leaks() == ["the landing is not closed"]


async def test_a_pool_closes_although_a_landing_hangs_and_tells_of_it(rig: Rig) -> None:
    pool, target = pool_of(rig), Target(rig.sender.incarnation, rig.address)
    first = await pool.pair(target)
    first._shut("the sender ended the stream")
    assert await pool.pair(target) is not first
    assert pool.leaks() == ["the landing is not closed"], "another pair took its place, not its slab"
    async with asyncio.timeout(5.0):
        await pool.close()
    assert pool.leaks() == ["the landing is not closed"] * 2
    assert rig.budget.quarantined_bytes == 2 * SETTINGS.slab_bytes


async def test_a_sender_closes_although_a_link_hangs() -> None:
    backend = _Hanging(links=True)
    async with make_rig(backend, replace(SETTINGS, quiesce_s=0.2)) as rig:
        client = await rig.connected()
        assert not (await client.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink())).error
        async with asyncio.timeout(5.0):
            await rig.service.close()
        await eventually(lambda: client.closed)
        backend.free.set()
        await rig.quiet(client)
