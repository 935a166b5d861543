"""Server-sent events straight over ASGI, with a bounded buffer between those who make tokens and one client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.body import wait_disconnect


class SlowClient(Exception):
    """The client reads slower than tokens come, and its buffer is full."""


class EventBuffer:
    """Events on their way to one client; what gathers while a write is under way goes out as one write."""

    def __init__(self, limit: int) -> None:
        """limit: events held at most."""
        self._limit = limit
        self._events: list[bytes] = []
        self._wake = asyncio.Event()
        self._ended = False

    def put(self, event: bytes) -> None:
        """Adds an event. Raises SlowClient when the buffer is full."""
        if len(self._events) >= self._limit:
            raise SlowClient
        self._events.append(event)
        self._wake.set()

    def end(self) -> None:
        """No more events will come."""
        self._ended = True
        self._wake.set()

    async def take(self) -> bytes:
        """All events there are, waiting for one; empty at the end."""
        await self._wake.wait()
        self._wake.clear()
        taken, self._events = self._events, []
        if self._ended:
            self._wake.set()
        return b"".join(taken)


Produce = Callable[[EventBuffer], Awaitable[None]]


class EventStream(Response):
    """A response whose events are put by `produce`, which must end the stream's meaning itself (`[DONE]` or an error).

    `produce` is cancelled when the client goes away, and finished or cancelled in every case before the response ends.
    When it raises, the connection is cut without the end that HTTP would need: no client takes that for success.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Produce, limit: int) -> None:
        """limit: events buffered for a slow client before it is cut."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        buffer = EventBuffer(self._limit)
        producer = asyncio.ensure_future(self._run(buffer))
        sender = asyncio.ensure_future(self._send(buffer, send))
        watch = asyncio.ensure_future(wait_disconnect(receive))
        tasks = (producer, sender, watch)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if producer.done() and producer.exception() is None:
                await asyncio.wait((sender, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, buffer: EventBuffer) -> None:
        await self._produce(buffer)
        buffer.end()

    async def _send(self, buffer: EventBuffer, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while data := await buffer.take():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
