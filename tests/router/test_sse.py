"""The event stream over bare ASGI: bounded buffers, slow clients, vanished clients."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.http.sse import DIRECT, EventBuffer, EventStream, Flusher, SlowClient

SCOPE: dict[str, Any] = {"type": "http", "headers": []}


class Peer:
    """An ASGI server with one client. `gate` is closed while the client does not read."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.gate.wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


async def test_events_arrive_in_order_and_the_response_ends() -> None:
    async def produce(buffer: EventBuffer) -> None:
        for number in range(100):
            buffer.put(b"%d," % number)
            if number % 7 == 0:
                await asyncio.sleep(0)

    peer = Peer()
    await EventStream(produce, 100, Flusher())(SCOPE, peer.receive, peer.send)
    assert peer.body == b"".join(b"%d," % number for number in range(100))
    assert peer.complete
    headers = dict(peer.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers


async def test_what_gathers_goes_out_as_one_write() -> None:
    async def produce(buffer: EventBuffer) -> None:
        for _ in range(50):
            buffer.put(b"x")

    peer = Peer()
    await EventStream(produce, 50, Flusher())(SCOPE, peer.receive, peer.send)
    assert [message["body"] for message in peer.sent[1:]] == [b"x" * 50, b""]


async def test_a_slow_client_is_cut_without_an_end() -> None:
    produced: list[int] = []

    async def produce(buffer: EventBuffer) -> None:
        for number in range(1000):
            buffer.put(b"x")
            produced.append(number)
            await asyncio.sleep(0)

    peer = Peer()
    peer.gate.clear()
    await EventStream(produce, 10, Flusher())(SCOPE, peer.receive, peer.send)
    assert len(produced) < 15
    assert not peer.complete


async def test_a_vanished_client_cancels_the_producer() -> None:
    ended = asyncio.Event()
    started = asyncio.Event()

    async def produce(buffer: EventBuffer) -> None:
        try:
            buffer.put(b"x")
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    peer = Peer()
    serving = asyncio.ensure_future(EventStream(produce, 10, Flusher())(SCOPE, peer.receive, peer.send))
    await started.wait()
    peer.gone.set()
    await serving
    assert ended.is_set()
    assert not peer.complete


async def test_a_failing_producer_cuts_the_connection() -> None:
    async def produce(buffer: EventBuffer) -> None:
        buffer.put(b"x")
        await asyncio.sleep(0)
        raise RuntimeError("defect")

    peer = Peer()
    await EventStream(produce, 10, Flusher())(SCOPE, peer.receive, peer.send)
    assert not peer.complete


async def test_a_full_buffer_refuses() -> None:
    buffer = EventBuffer(2, Flusher())
    buffer.put(b"a")
    buffer.put(b"b")
    with pytest.raises(SlowClient):
        buffer.put(b"c")
    assert await buffer.take() == b"ab"
    buffer.end()
    assert await buffer.take() == b""
    assert await buffer.take() == b""


async def test_many_choices_may_have_more_events_and_together_not_too_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.http.sse.MANY_BYTES", 10)
    for event, held in ((b"x", 6), (b"xxxx", 2), (b"x" * 20, 2)):
        buffer = EventBuffer(2, Flusher(), choices=3)
        for _ in range(2):  # what was taken does not count
            for _ in range(held):
                buffer.put(event)
            with pytest.raises(SlowClient):
                buffer.put(event)
            assert await buffer.take() == event * held


class Direct:
    """A transport that is written to without ASGI, while `open`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.open = True
        self.writes = 0

    def ready(self) -> bool:
        return self.open and bool(self._peer.sent)

    def write(self, data: bytes) -> None:
        self.writes += 1
        self._peer.sent.append({"body": data})


async def test_events_of_one_turn_are_one_direct_write_and_nothing_overtakes_what_waits() -> None:
    peer = Peer()
    direct = Direct(peer)
    expected = b"".join(b"%d," % number for number in range(60))

    async def produce(buffer: EventBuffer) -> None:
        for number in range(60):
            buffer.put(b"%d," % number)
            if number == 20:
                peer.gate.clear()
                direct.open = False  # the client stops reading
            if number == 22:
                direct.open = True  # the transport takes more, while a write through ASGI still waits
            if number == 40:
                peer.gate.set()
            if number % 2:
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    scope = {**SCOPE, "extensions": {DIRECT: direct}}
    await EventStream(produce, 100, Flusher())(scope, peer.receive, peer.send)
    assert peer.body == expected
    assert peer.complete
    assert 10 < direct.writes <= 30
    assert len(peer.sent) < 40


async def test_a_slow_client_is_cut_where_writes_are_direct() -> None:
    peer = Peer()
    direct = Direct(peer)

    async def produce(buffer: EventBuffer) -> None:
        await asyncio.sleep(0)
        direct.open = False
        peer.gate.clear()
        for _ in range(1000):
            buffer.put(b"x")
            await asyncio.sleep(0)

    await EventStream(produce, 10, Flusher())({**SCOPE, "extensions": {DIRECT: direct}}, peer.receive, peer.send)
    assert not peer.complete
    assert len(peer.body) < 15
