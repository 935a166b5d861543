"""OpenAI's own client, and raw sockets, against the router on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import uvicorn

from router.http import http_limits
from router.http.http_limits import LimitedHttp

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
ANSWER = "Hello, world! 🙂"


@pytest_asyncio.fixture
async def port(world: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(world.app, port=0, log_config=None, lifespan="off", http=LimitedHttp, ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


@pytest_asyncio.fixture
async def sdk(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"http://127.0.0.1:{port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        yield client


async def test_whole_answers(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    completion = await sdk.completions.create(model="tiny", prompt="Hi", logprobs=1)
    assert completion.choices[0].text == ANSWER
    assert [model.id async for model in sdk.models.list()] == ["tiny"]


async def test_streams(sdk: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    texts = await sdk.completions.create(model="tiny", prompt="Hi", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in texts]) == ANSWER


async def test_the_sdk_sees_a_failing_stream_as_an_error(sdk: openai.AsyncOpenAI, world: Any) -> None:
    world.dispatcher.fail_after = 2
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the decode worker died"):
        async for _ in stream:
            pass


async def test_the_sdk_sees_refusals_by_kind(sdk: openai.AsyncOpenAI, world: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="other", messages=MESSAGES)
    world.dispatcher.fail_after = 0
    with pytest.raises(openai.InternalServerError):
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_the_work(port: int, world: Any, stream: bool) -> None:
    world.dispatcher.hold_at = 2
    body = json.dumps({"messages": MESSAGES, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await world.dispatcher.held.wait()
    if stream:
        await reader.readuntil(b'"content":"H')
    writer.close()
    (accepted,) = world.dispatcher.accepted
    await asyncio.wait_for(accepted.cancelled.wait(), 10)
    while world.metric("tandem_requests_running"):
        await asyncio.sleep(0)
    assert world.metric("tandem_requests_total", endpoint="chat", outcome="cancelled") == 1
    assert accepted.closed
    await writer.wait_closed()


async def test_a_client_that_goes_away_while_queueing_ends_the_submission(port: int, world: Any) -> None:
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def submit(request: Any) -> Any:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    world.dispatcher.submit = submit
    body = json.dumps({"messages": MESSAGES}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    await waiting.wait()
    writer.close()
    await asyncio.wait_for(ended.wait(), 10)
    await writer.wait_closed()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_gets_the_envelope(port: int, chunked: bool) -> None:
    block = b" " * (1 << 20)

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield block

    headers = {} if chunked else {"content-length": str(20 << 20)}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        response = await client.post("/v1/chat/completions", content=blocks(), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert (await client.get("/health")).status_code == 200


async def test_a_declared_length_is_refused_before_the_body_comes(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
    assert b" 413 " in await reader.readline()
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"connection: close" in head
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert b"request_too_large" in await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()


async def test_endless_headers_are_refused(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(64):
            writer.write(b"x" * 65536)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
        assert b" 400 " in answer or answer == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health", headers={"x-fine": "y" * 8000})).status_code == 200


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
async def test_headers_that_never_end_are_given_up(port: int, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    answer = await asyncio.wait_for(reader.read(), 20)
    assert (b" 400 " in answer) if head else answer == b""
    writer.close()
    await writer.wait_closed()
