"""Sender and receiver in two processes: the real case, and the one in which a process can die."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.backends import choose
from kvtransfer.base import Backend, Identity, TransportError
from kvtransfer.inbound import InboundSettings, PairClient
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from tandem.cluster import Ticket, new_id
from tandem.config import child_environment
from tandem.errors import ConfigError, Fenced, Unavailable
from tandem.testing.kv import FakeSink, small_layout
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import TOKENS

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = small_layout()
SETTINGS = InboundSettings(slab_mib=0.125, span_tokens=32, lease_s=1.5, handshake_deadline_s=30.0, quiesce_s=5.0)
ME = Identity(new_id(), LAYOUT, "model-fingerprint")


@pytest.fixture(params=["nixl", "tcp"], scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    return usable(request.param)


def usable(transport: str) -> Backend:
    try:
        return choose(transport).preferred
    except ConfigError as error:
        if isinstance(error.__cause__, TransportError):
            raise
        pytest.skip(f"nixl is not importable: {error}")


class Sender:
    """A sender process."""

    def __init__(self, process: asyncio.subprocess.Process, incarnation: str, port: int) -> None:
        self.process, self.incarnation, self.address = process, incarnation, f"127.0.0.1:{port}"

    def compute(self, tokens: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n".encode())

    def ticket(self) -> Ticket:
        return Ticket(new_id(), new_id(), 0, self.incarnation, ME.incarnation, LAYOUT.digest(), 20.0, 20.0)


@asynccontextmanager
async def sender(transport: str, cached: int = 1 << 40) -> AsyncIterator[Sender]:
    incarnation = new_id()
    script = Path(__file__).with_name("sender_process.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, transport, incarnation, str(cached), cwd=ROOT,
        env=child_environment({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        yield Sender(process, incarnation, port)
        if process.returncode is None:
            output, _ = await asyncio.wait_for(process.communicate(b""), 30)
            assert output.decode().strip().splitlines()[-1] == "[]", "the sender leaked"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def receive(backend: Backend) -> AsyncIterator[Receiver]:
    receiver = Receiver(backend)
    yield receiver
    await receiver.close()


class Receiver:
    """Makes receivers on one transfer thread."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.budget, self.thread = backend, SlabBudget(1 << 20), TransferThread()
        self.clients: list[PairClient] = []
        self.thread.start()

    async def __call__(self, peer: Sender, incarnation: str = "", quiesce_s: float = 5.0) -> PairClient:
        settings = replace(SETTINGS, quiesce_s=quiesce_s)
        client = PairClient(
            ME, peer.address, incarnation or peer.incarnation, self.backend, self.thread, self.budget, settings
        )
        self.clients.append(client)
        await client.connect()
        return client

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
            assert client.leaks() == []
        assert self.budget.used_bytes == 0
        self.thread.close()


async def test_bytes_are_equal_and_ranges_are_used_again(backend: Backend, receive: Receiver) -> None:
    async with sender(backend.name) as peer:
        client = await receive(peer)
        for _ in range(3):
            sinks = [FakeSink(), FakeSink(first=100)]
            results = await asyncio.gather(
                *(client.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink) for sink in sinks)
            )
            assert [result.error for result in results] == ["", ""]
            assert sinks[0].holds(LAYOUT, TOKENS, 0, len(TOKENS))
            assert sinks[1].holds(LAYOUT, TOKENS, 100, len(TOKENS))
        await eventually(lambda: not client.leaks())


async def test_a_cancel_while_spans_move_is_quiesced(backend: Backend, receive: Receiver) -> None:
    async with sender(backend.name, cached=300) as peer:
        client = await receive(peer)
        sink = FakeSink()
        fetch = asyncio.create_task(client.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink))
        await sink.landing.wait()
        fetch.cancel()
        peer.compute(len(TOKENS))
        await eventually(lambda: not client.leaks())
        assert not client.closed
        sink = FakeSink()
        again = asyncio.create_task(client.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink))
        await sink.landing.wait()
        peer.compute(len(TOKENS))
        assert (await again).error == ""
        assert sink.holds(LAYOUT, TOKENS, 0, len(TOKENS))
        await eventually(lambda: not client.leaks())


async def test_a_killed_sender_ends_fetches_and_its_successor_serves(backend: Backend, receive: Receiver) -> None:
    async with sender(backend.name, cached=300) as peer:
        client = await receive(peer)
        sink = FakeSink()
        fetch = asyncio.create_task(client.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink))
        await sink.landing.wait()
        peer.process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(SETTINGS.lease_s):
            result = await fetch
        assert "the pair is closed" in result.error
        assert result.landed_until <= 300
        await eventually(lambda: not client.leaks())
        assert receive.budget.used_bytes == 0
        await peer.process.wait()
    async with sender(backend.name) as successor:
        with pytest.raises(Fenced, match="sender is"):
            await receive(successor, incarnation=peer.incarnation)
        client = await receive(successor)
        sink = FakeSink()
        assert (await client.fetch(successor.ticket(), TOKENS, "salt", "", 0, sink)).error == ""
        assert sink.holds(LAYOUT, TOKENS, 0, len(TOKENS))
        await eventually(lambda: not client.leaks())


def test_the_memory_of_a_nixl_slab_is_only_ever_a_slab_again() -> None:
    backend = usable("nixl")
    first = backend.landing("me", "peer", 1 << 16)
    address = first.memory.ctypes.data
    other = backend.landing("me", "peer", 1 << 16)
    assert other.memory.ctypes.data != address
    first.close()
    first.close()
    again = backend.landing("me", "another", 1 << 16)
    fresh = backend.landing("me", "another", 1 << 16)
    assert again.memory.ctypes.data == address
    assert fresh.memory.ctypes.data not in (address, other.memory.ctypes.data)
    for landing in (other, again, fresh):
        landing.close()


async def test_a_stopped_sender_is_given_up_after_its_lease(backend: Backend, receive: Receiver) -> None:
    async with sender(backend.name, cached=300) as peer:
        client = await receive(peer)
        sink = FakeSink()
        fetch = asyncio.create_task(client.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink))
        await sink.landing.wait()
        peer.process.send_signal(signal.SIGSTOP)
        try:
            assert "lease_s" in (await fetch).error
            await eventually(lambda: not client.leaks())
        finally:
            peer.process.send_signal(signal.SIGCONT)
        again = await receive(peer)
        sink = FakeSink()
        fetch = asyncio.create_task(again.fetch(peer.ticket(), TOKENS, "salt", "", 0, sink))
        await sink.landing.wait()
        peer.compute(len(TOKENS))
        assert (await fetch).error == ""
        assert sink.holds(LAYOUT, TOKENS, 0, len(TOKENS))
        await eventually(lambda: not again.leaks())


async def test_a_stopped_sender_cannot_be_connected(backend: Backend, receive: Receiver) -> None:
    async with sender(backend.name) as peer:
        peer.process.send_signal(signal.SIGSTOP)
        client = PairClient(
            ME, peer.address, peer.incarnation, backend, receive.thread, receive.budget,
            replace(SETTINGS, handshake_deadline_s=0.5),
        )  # fmt: skip
        with pytest.raises(Unavailable, match=r"handshake_deadline_s = 0\.5"):
            await client.connect()
        assert client.leaks() == []
        peer.process.send_signal(signal.SIGCONT)
