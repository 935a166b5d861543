"""Limits on what a client may send before there is a request, and on how long it may leave its answers unread."""

from __future__ import annotations

import asyncio
import fcntl
import math
import sys
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.http.sse import DIRECT

HEAD_BYTES = 16 << 10
"""Request line and headers."""
HEAD_TIMEOUT_S = 10.0
"""Seconds from a connection's start, or a request's first byte, to the end of its headers."""
STALLED_S = 30.0
"""Seconds between two looks at a client that is to read: it is given up when it took nothing from one to the next."""


LARGE_HEAD = f"the headers have more than {HEAD_BYTES} bytes"
MAX_CHUNKS = 1 << 16
"""Of a body with `transfer-encoding: chunked`: a byte for each costs hundreds of times what it brings."""
FULL = b'{"error":{"message":"too many connections are open","type":"service_unavailable","param":null,"code":null}}'


class ChunkedBody:
    """See `DirectBody`: a response's chunks straight to the transport, while uvicorn would do no more than that."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def ready(self) -> bool:
        """See `DirectBody`."""
        cycle = self._cycle
        open_now = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        return bool(open_now and cycle.chunked_encoding and not cycle.flow.write_paused)

    def write(self, data: bytes) -> None:
        """See `DirectBody`."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class LimitedHttp(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol, which by itself keeps headers of any size and waits for them for ever.

    It also waits for ever until answers are read, those included after which the connection is to be closed.
    """

    def __init__(self, *args: Any, max_connections: int = 8192, **named: Any) -> None:
        """max_connections: at once; one more is told 503 and closed. The rest: uvicorn's."""
        super().__init__(*args, **named)
        self._max_connections = max_connections
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = self._parsed = self._chunks = 0
        self._reason = ""
        self._watch: asyncio.TimerHandle | None = None
        self._unread = math.inf

    def connection_made(self, transport: Any) -> None:
        """asyncio.Protocol"""
        super().connection_made(transport)
        self._look()
        if len(self.connections) > self._max_connections:
            head = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
            self.transport.write(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(FULL) + FULL)
            self.transport.close()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol"""
        awaited, cycle = self._deadline is not None, self.cycle
        super().data_received(data)
        # No head ended in this read, nor did a body: all of it is of one head.
        if awaited and self._deadline is not None and self.cycle is cycle:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._give_up(LARGE_HEAD)

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; a read may bring many at once."""
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._parsed += size
        if self._parsed > HEAD_BYTES:
            self._refuse(LARGE_HEAD)

    def on_chunk_header(self) -> None:
        """One more chunk of a body."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            self._refuse(f"the body has more than {MAX_CHUNKS} chunks")

    def _refuse(self, reason: str) -> None:
        self._reason = reason
        raise ValueError(reason)  # the parser stops, and uvicorn sends 400

    def send_400_response(self, msg: str) -> None:
        """Ends the connection, with the reason unless it would be taken for the answer to an earlier request."""
        last: Any = self.cycle  # None before the first request
        if last and not last.response_complete and (self.pipeline or last.response_started or not last.more_body):
            self.transport.close()
        elif not self.transport.is_closing():
            super().send_400_response(self._reason or msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol"""
        self._head_complete()
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """asyncio.Protocol"""
        super().resume_writing()
        self._unread = math.inf  # it reads: when it holds us up again, that counts anew

    def _look(self) -> None:
        """Ends the connection when the client has read nothing since the last look, and is waited for."""
        unread = math.inf
        # Closing waits for less than what pauses writing, too.
        if self.flow.write_paused or self.transport.is_closing():
            # The kernel takes more in large steps, so that a slow reader shows first in what it still holds.
            kernel = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
            unread = self.transport.get_write_buffer_size() + int.from_bytes(kernel, sys.byteorder)
            if unread >= self._unread:
                self.transport.abort()
                return
        self._unread, self._watch = unread, self.loop.call_later(STALLED_S, self._look)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """The end of its headers."""
        self._head_complete()
        super().on_headers_complete()
        # The application starts in the next turn of the loop, and finds it there.
        self.scope["extensions"] = {DIRECT: ChunkedBody(self.cycle)}  # type: ignore[dict-item]

    def _expect_head(self) -> None:
        self._head_complete()
        self._head_bytes = self._parsed = self._chunks = 0
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _head_complete(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self, reason: str = f"the headers did not arrive within {HEAD_TIMEOUT_S:g} seconds") -> None:
        if self._head_bytes or self._parsed:
            self.send_400_response(reason)
        else:
            self.transport.close()  # an idle connection: there is nothing to answer
