"""A pool of pairs whose slabs' cap leaves no room for one more, over real gRPC."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import FetchResult
from kvtransfer.inbound import PairClient
from kvtransfer.pairs import PairPool, Target
from kvtransfer.slab import SlabBudget
from tandem.errors import Overloaded
from tandem.testing.kv import FakeSink
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import SETTINGS, TOKENS, Rig, make_rig


async def test_two_senders_take_turns_with_the_only_slab() -> None:
    async with AsyncExitStack() as stack:
        rigs = [await stack.enter_async_context(make_rig(InprocBackend())) for _ in range(2)]
        budget = SlabBudget(SETTINGS.slab_bytes)
        by_incarnation = {rig.sender.incarnation: rig for rig in rigs}
        for rig in rigs:
            rig.budget = budget
        pool = PairPool(lambda incarnation, _: by_incarnation[incarnation].client())
        stack.push_async_callback(pool.close)
        targets = [Target(rig.sender.incarnation, rig.address) for rig in rigs]

        for at in (0, 1, 1, 0):
            pair = await pool.pair(targets[at])
            result = await fetch(rigs[at], pair)
            assert (result.error, result.landed_until) == ("", len(TOKENS))
            await rigs[at].quiet(pair)
            assert budget.used_bytes == SETTINGS.slab_bytes
        with pytest.raises(Overloaded, match="exceed slabs_max_mib"):
            await pool.pair(targets[1], needed=False)
        assert await pool.pair(targets[0]) is pair
        assert all(rig.failures == [] for rig in rigs)


async def test_a_pair_that_is_over_does_not_wait_for_the_collector() -> None:
    over: list[weakref.ref[PairClient]] = []

    async def use(rig: Rig) -> None:
        pair = await rig.connected()
        assert not (await fetch(rig, pair)).error
        await pair.close()
        over.append(weakref.ref(pair))

    async with make_rig(InprocBackend()) as rig:
        gc.disable()
        try:
            for _ in range(3):
                rig.stack = AsyncExitStack()  # it would know the pairs until the end
                async with rig.stack:
                    await asyncio.create_task(use(rig))
            await eventually(lambda: [pair() for pair in over] == [None] * 3)
        finally:
            gc.enable()


async def fetch(rig: Rig, pair: PairClient) -> FetchResult:
    return await pair.fetch(rig.ticket(), TOKENS, "", "", 0, FakeSink())
