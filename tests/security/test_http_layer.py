"""CVE-2025-48956, CVE-2025-23310, slow loris, CVE-2024-8768: bytes before there is a request, answers left unread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn
import uvloop

from router.http import http_limits
from router.main import HttpServer, listen
from tandem.testing.polling import eventually
from tests.security.rig import Front

CONNECTIONS = 6


@pytest_asyncio.fixture
async def port(opened: Front) -> AsyncIterator[int]:
    server = HttpServer(opened.app, 0.0, CONNECTIONS)
    with listen("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


async def say(port: int, *parts: bytes) -> bytes:
    """What comes back until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            answer = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


async def serves(port: int) -> bool:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = {"prompt": "hi", "max_tokens": 2}
        return (await client.post("/v1/completions", json=body)).status_code == 200


FILL = b"x" * http_limits.HEAD_BYTES


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET /health HTTP/1.1\r\nhost: x\r\nlong: " + FILL + b"\r\n\r\n",),
        (b"GET /health?" + FILL + b" HTTP/1.1\r\nhost: x\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 3000 + b"\r\n",),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nlong: ", *[b"x" * 4096] * 8),
    ],
    ids=["one header", "the path", "many headers", "without an end"],
)
async def test_headers_have_16_kib(parts: tuple[bytes, ...], port: int) -> None:
    answer = await say(port, *parts)
    assert answer == b"" or (
        answer.startswith(b"HTTP/1.1 400 ") and b"the headers have more than 16384 bytes" in answer
    )
    assert await serves(port)


BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode().ljust(40_000)
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY


async def test_a_body_is_not_counted_as_the_next_request_s_headers(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(POST + b"GET /hea")
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.write(b"lth HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "rest", [b"\0\0", b"GET /health HTTP/1.1\r\nlong: " + FILL + b"\r\n\r\n"], ids=["wrong", "long"]
)
async def test_a_bad_next_request_is_no_answer_to_the_one_before(rest: bytes, port: int) -> None:
    assert b" 400 " not in await say(port, POST + rest)
    assert await serves(port)


async def test_headers_below_that_are_fine(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health", headers={"long": "y" * 15_000})).status_code == 200


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"], ids=["silent", "slow"])
async def test_slow_loris(head: bytes, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.1)
    answers = await asyncio.gather(*(say(port, head) for _ in range(CONNECTIONS)))
    assert all(answer == b"" or answer.startswith(b"HTTP/1.1 400 ") for answer in answers)
    assert await serves(port)


async def test_a_body_in_tiny_chunks_is_refused(port: int) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    many = b"1\r\n \r\n" * 10_000
    answer = await say(port, head, *[many] * (http_limits.MAX_CHUNKS // 10_000 + 1))
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 400 ") and b"more than 65536 chunks" in answer)
    assert await serves(port)


async def test_connections_are_counted(port: int) -> None:
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    for reader, writer in held:
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    answer = await say(port, b"")
    assert answer.startswith(b"HTTP/1.1 503 ") and b"too many connections are open" in answer
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    while not await serves(port):
        await asyncio.sleep(0.01)


LARGE = 4 << 20
SMALL_BUFFER = 64 << 10


class Large:
    """An application with a large answer, in one write, in many, or cut in the middle."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            headers = [(b"content-length", b"%d" % LARGE)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            parts = 64 if scope["path"] == "/many" else 1
            for _ in range(parts):
                await send({"type": "http.response.body", "body": bytes(LARGE // parts), "more_body": True})
            if scope["path"] != "/cut":
                await send({"type": "http.response.body"})
        finally:
            self.ends.append(scope["path"])


async def asked(port: int, path: str) -> socket.socket:
    """A client that has asked for a large answer and has not read of it."""
    client = socket.socket()
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
    return client


async def unread_answers(paths: list[str], check: Callable[[uvicorn.Server, Large, list[socket.socket]], Any]) -> Large:
    app = Large()
    served: Any = app  # it is no FastAPI, and needs not be
    server = HttpServer(served, 0.0, CONNECTIONS)
    with listen("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        serving = asyncio.create_task(server.serve([listener]))
        clients = [await asked(listener.getsockname()[1], path) for path in paths]
        async with asyncio.timeout(20):
            await check(server, app, clients)
        server.should_exit = True
        for client in clients:
            client.close()
        await serving
    return app


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_clients_that_do_not_read_their_answers_are_given_up(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "STALLED_S", 0.1)

    async def all_gone(server: uvicorn.Server, app: Large, clients: list[socket.socket]) -> None:
        await eventually(lambda: len(app.ends) == len(clients) and not server.server_state.connections)

    paths = ["/one", "/many", "/cut"]
    with asyncio.Runner(loop_factory=loop) as runner:
        assert sorted(runner.run(unread_answers(paths, all_gone)).ends) == sorted(paths)


@LOOPS
def test_a_slow_reader_gets_all_of_its_answer(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "STALLED_S", 0.2)
    got = []

    async def read(server: uvicorn.Server, app: Large, clients: list[socket.socket]) -> None:
        total = 0
        while total < LARGE:
            data = await asyncio.get_running_loop().sock_recv(clients[0], SMALL_BUFFER)
            if not data:
                break
            total += len(data)
            await asyncio.sleep(0.03)
        got.append(total)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(unread_answers(["/many"], read))
    assert got[0] >= LARGE


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\ud800"], ids=["empty", "NUL", "NUL inside", "lone surrogate"])
async def test_texts_that_are_none_are_refused(text: str, anyone: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text or "\0"}]}),
    ):  # fmt: skip
        raw = json.dumps(body)
        assert (await anyone.post(path, content=raw)).status_code == 400
