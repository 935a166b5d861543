"""Server-sent events straight over ASGI, with a bounded buffer between those who make tokens and one client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.body import wait_disconnect

DIRECT = "tandem.direct"
"""The scope's extension that writes the body without ASGI's calls, which cost more than all else of a token."""
MANY_BYTES = 16 << 20
"""What the events of many choices may take together; as many as one choice may have, may be larger."""


class SlowClient(Exception):
    """The client reads slower than tokens come, and its buffer is full."""


class DirectBody(Protocol):
    """A way to write a response's body without ASGI, found in the scope under `DIRECT`."""

    def ready(self) -> bool:
        """Whether the headers are out and the client takes what is written."""

    def write(self, data: bytes) -> None:
        """Writes a part of the body."""


class Flusher:
    """Flushes all buffers that got events in one turn of the event loop, in the next: one callback for all of them."""

    def __init__(self) -> None:
        self._waiting: list[EventBuffer] = []

    def mark(self, buffer: EventBuffer) -> None:
        """A buffer has got its first event."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(buffer)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for buffer in waiting:
            buffer.flush()


class EventBuffer:
    """Events on their way to one client; what gathers in a turn, or while a write is under way, goes out as one write.

    Written directly while the client reads; what it does not take waits for `take`, up to a limit.
    """

    def __init__(self, limit: int, flusher: Flusher, direct: DirectBody | None = None, choices: int = 1) -> None:
        """limit: events of each choice held at most."""
        self._limit = limit
        self._choices = choices
        self._flusher = flusher
        self._direct = direct
        self._events: list[bytes] = []
        self._bytes = 0
        self._wake = asyncio.Event()
        self._taken = False
        """What was taken may not be written yet: nothing may overtake it."""
        self._ended = False

    def put(self, event: bytes) -> None:
        """Adds an event. Raises SlowClient when the buffer is full."""
        events = self._events
        if not events:
            self._bytes = 0
            self._flusher.mark(self)
        elif len(events) >= self._limit and (
            len(events) >= self._limit * self._choices or self._bytes + len(event) > MANY_BYTES
        ):
            raise SlowClient
        self._bytes += len(event)
        events.append(event)

    def flush(self) -> None:
        """Writes what there is, or lets `take` have it."""
        if self._direct is None or self._taken or not self._direct.ready():
            self._wake.set()
        elif self._events:
            events, self._events = self._events, []
            self._direct.write(events[0] if len(events) == 1 else b"".join(events))

    def end(self) -> None:
        """No more events will come."""
        self._ended = True
        self._wake.set()

    async def take(self) -> bytes:
        """All events that were not written directly, waiting for one; empty at the end. Ends what was taken before."""
        self._taken = False
        while not self._events and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        self._taken = True
        taken, self._events = self._events, []
        return b"".join(taken)


Produce = Callable[[EventBuffer], Awaitable[None]]


class EventStream(Response):
    """A response whose events are put by `produce`, which must end the stream's meaning itself (`[DONE]` or an error).

    `produce` is cancelled when the client goes away, and finished or cancelled in every case before the response ends.
    When it raises, the connection is cut without the end that HTTP would need: no client takes that for success.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Produce, limit: int, flusher: Flusher, choices: int = 1) -> None:
        """limit: events of each choice buffered for a slow client before it is cut."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce
        self._limit = limit
        self._flusher = flusher
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        direct = scope.get("extensions", {}).get(DIRECT)
        buffer = EventBuffer(self._limit, self._flusher, direct, self._choices)
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
