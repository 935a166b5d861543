"""Reads many event streams with as little work as possible, so that two cores are enough for a router under load.

    python -m benchmarks.stream_client PORT CONCURRENCY BODIES

BODIES: a file with one JSON body a line, sent in this order by CONCURRENCY connections. Prints what came as JSON. With
`--open` it only opens all streams, prints a line when each has had its first token, and waits for the end of its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop

DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
PATH = b"/v1/chat/completions"


class Reader(asyncio.Protocol):
    """One connection that sends a body, counts the events of its answer, and goes on with the next."""

    def __init__(self, bodies: Iterator[bytes], first: asyncio.Event | None) -> None:
        self._bodies = bodies
        self._first = first
        self.events = 0
        self.answers = 0
        self.problem = ""
        self.closed = asyncio.Event()
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        if self._first is not None and b'"content":"' in data:
            self._first.set()
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(END):
            if DONE not in self._tail:
                self.problem = "a stream ended without [DONE]"
            self.answers += 1
            self._tail = b""
            self._send()
        elif b"HTTP/1.1 4" in data or b"HTTP/1.1 5" in data:
            self.problem = data[:300].decode(errors="replace")
            self._transport.close()

    def _send(self) -> None:
        body = next(self._bodies, None)
        if body is None:
            self._transport.close()
            return
        head = b"POST %s HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % (PATH, len(body)) + body)


async def read(port: int, concurrency: int, bodies: list[bytes]) -> dict[str, object]:
    """All streams to their end."""
    loop, waiting = asyncio.get_running_loop(), iter(bodies)
    started = time.monotonic()
    readers = [
        (await loop.create_connection(lambda: Reader(waiting, None), "127.0.0.1", port))[1] for _ in range(concurrency)
    ]
    await asyncio.gather(*(reader.closed.wait() for reader in readers))
    return {
        "seconds": time.monotonic() - started,
        "events": sum(reader.events for reader in readers),
        "answers": sum(reader.answers for reader in readers),
        "problems": sorted({reader.problem for reader in readers if reader.problem}),
    }


async def hold(port: int, bodies: list[bytes]) -> None:
    """Opens a stream for each body and keeps them open."""
    loop, readers = asyncio.get_running_loop(), []
    for body in bodies:
        first = asyncio.Event()
        _, reader = await loop.create_connection(lambda b=body, f=first: Reader(iter([b]), f), "127.0.0.1", port)  # type: ignore[misc]
        readers.append((reader, first))
        if len(readers) % 200 == 0:
            await first.wait()
    for reader, first in readers:
        async with asyncio.timeout(60):
            await first.wait()
        if reader.problem:
            raise SystemExit(reader.problem)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    lines = Path(sys.argv[3]).read_bytes().splitlines()
    if "--open" in sys.argv:
        uvloop.run(hold(int(sys.argv[1]), lines))
    else:
        found = uvloop.run(read(int(sys.argv[1]), int(sys.argv[2]), lines))
        sys.stdout.write(json.dumps(found) + "\n")
