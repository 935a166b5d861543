"""A client of OpenAI's streamed endpoints that costs little: asyncio and an HTTP/1.1 parser in C, nothing between.

A load generator on the machine it measures takes its time from the server; a general client costs several times as
much for each chunk as this one.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

CONNECT_S = 10.0


@dataclass(slots=True)
class Sample:
    """One request as its client saw it. Times are `time.perf_counter()`."""

    started: float
    wished_tokens: int
    ended: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """When each chunk with output arrived."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first_tokens: int = 0
    """Output tokens of the first chunk with output; 0 unless the server tells the usage with each chunk."""
    text: str = ""
    error: str = ""
    """A few words that count as a kind; empty for success."""
    detail: str = ""

    def take(self, chunk: dict[str, Any], now: float) -> None:
        """One event of the stream."""
        before = len(self.chunks)
        for choice in chunk.get("choices") or ():
            if (piece := _output(choice)) is not None:
                self.chunks.append(now)
                self.text += piece
        if usage := chunk.get("usage"):
            if self.chunks and not before:
                self.first_tokens = usage["completion_tokens"]
            self.prompt_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def failed(self, kind: str, detail: str) -> Sample:
        """It ended now, with an error."""
        self.error, self.detail, self.ended = kind, detail, time.perf_counter()
        return self


class _Connection(asyncio.Protocol):
    """One kept-alive connection; `done` is set when the answer to its request has ended, as good or bad as it came."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reusable = False
        self._parser = httptools.HttpResponseParser(self)
        self._sample: Sample | None = None
        self._done: asyncio.Future[None] | None = None
        self._rest = self._body = b""
        self._finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, sample: Sample, request: bytes) -> asyncio.Future[None]:
        """Sends a request whose answer goes to `sample`; the future tells its end."""
        assert self.transport is not None
        self.reusable = self._finished = False
        self._rest = self._body = b""
        self._sample, self._done = sample, asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("bad http", str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._fail("connection lost", str(exc or "the server closed it"))

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._body += body
            return
        now = time.perf_counter()
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"http {status}", self._body[:300].decode(errors="replace"))
        elif not self._finished:
            self._fail("cut off", "the stream ended without [DONE]")
        else:
            self._end()

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._finished = True
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            self._fail("bad event", data[:100].decode(errors="replace"))
            return
        if error := chunk.get("error"):
            kind = error.get("type") or error.get("code") if isinstance(error, dict) else ""
            self._fail(f"stream error {kind}".strip(), str(error)[:300])
        elif self._sample is not None:
            self._sample.take(chunk, now)

    def _fail(self, kind: str, detail: str) -> None:
        if self._sample is not None and not self._sample.error:
            self._sample.error, self._sample.detail = kind, detail
        self.reusable = False
        self._end()

    def _end(self) -> None:
        if self._sample is not None and self._done is not None and not self._done.done():
            self._sample.ended = time.perf_counter()
            self._done.set_result(None)
        self._sample = None


def _output(choice: dict[str, Any]) -> str | None:
    """The text of a chunk; None for one that brings no output, such as a chat's first, which names the role."""
    if "delta" in choice:
        delta = choice["delta"]
        return (delta.get("reasoning_content") or "") + (delta.get("content") or "") or None
    return choice.get("text")


class Client:
    """Keeps connections alive and opens as many as are needed at once."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url}; http://host:port is needed")
        self._host, self._tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n"
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    def authorize(self, key: str) -> None:
        """Sends a bearer token with each request."""
        self._head += f"Authorization: Bearer {key}\r\n"

    async def stream(self, path: str, body: dict[str, Any]) -> Sample:
        """POSTs `body`, which must ask for a stream with usage, and reads the answer. Raises nothing: see `error`."""
        raw = json.dumps(body, separators=(",", ":")).encode()
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(raw)}\r\n\r\n"
        sample = Sample(time.perf_counter(), body.get("max_tokens", 0))
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                await connection.send(sample, head.encode() + raw)
        except TimeoutError:
            sample.failed("timeout", f"no answer within {self._timeout_s:g} s")
        except OSError as error:
            sample.failed("no connection", str(error))
        if connection is not None and connection.transport is not None:
            if connection.reusable and not sample.error:
                self._idle.append(connection)
            else:
                connection.transport.close()
        if not sample.error and sample.output_tokens < sample.wished_tokens:
            sample.failed("short", f"{sample.output_tokens} of {sample.wished_tokens} tokens")
        return sample

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        async with asyncio.timeout(CONNECT_S):
            loop = asyncio.get_running_loop()
            _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return made

    def close(self) -> None:
        """Closes idle connections."""
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.close()
        self._idle.clear()
