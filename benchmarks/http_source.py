"""The same streams as `tandem.testing.token_source` sends, as an OpenAI server's: what a proxy stands in front of.

    python -m benchmarks.http_source PORT STEP_MS

Answers any GET with JSON, and each POST with a chat completion's events, one for each token of `max_tokens`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import cast

CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"source","system_fingerprint":"fp_f0f0f0f0f0f0","choices":[{"index":0,"delta":{"content":" token"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
START = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
PAGE = json.dumps({"status": "ok", "model_path": "source", "object": "list", "data": [{"id": "source"}]}).encode()


def framed(data: bytes) -> bytes:
    """A chunk of HTTP's chunked encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, active: dict[Connection, int]) -> None:
        self._active = active
        self._data = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._active.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0]) if lengths else 0
        if len(rest) < length:
            return
        self._data = rest[length:]
        if head.startswith(b"POST"):
            self.transport.write(START)
            body = json.loads(rest[:length])
            self._active[self] = body.get("max_completion_tokens") or body["max_tokens"]
        else:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(PAGE) + PAGE
            )


async def main(port: int, step_s: float) -> None:
    """Serves for ever."""
    active: dict[Connection, int] = {}
    await asyncio.get_running_loop().create_server(lambda: Connection(active), "127.0.0.1", port, backlog=1024)
    due, chunk, last = time.monotonic(), framed(CHUNK), framed(CHUNK) + framed(DONE) + END
    while True:
        for connection, left in list(active.items()):
            connection.transport.write(chunk if left > 1 else last)
            if left > 1:
                active[connection] = left - 1
            else:
                del active[connection]
        due = max(due + step_s, time.monotonic())
        await asyncio.sleep(due - time.monotonic())


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]) / 1e3))
