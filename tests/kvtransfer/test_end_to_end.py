from __future__ import annotations

import asyncio

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend
from tandem.testing.kv import FakeSink



@pytest.fixture(params=[InprocBackend, TcpBackend])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param()


async def eventually(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_fetch_lands_every_span_with_equal_bytes(backend, rig_maker) -> None:
    async with rig_maker(backend) as rig:
        client = await rig.client()
        await client.connect()
        tokens = tuple(range(1000, 2337))
        sink = FakeSink(first=48)
        result = await client.fetch(rig.ticket(), tokens, "salt", "", 0, sink)
        assert result.error == ""
        assert result.landed_until == len(tokens)
        assert result.bytes == (len(tokens) - 48) * rig.layout.token_bytes
        assert sink.holds(rig.layout, tokens, 48, len(tokens))
        await eventually(lambda: not client.leaks() and not rig.service.leaks())
        client.check_integrity()
