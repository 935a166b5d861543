"""Request bodies under a limit, and the end of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.errors import BadRequest, TooLarge

BODY_TIMEOUT_S = 60.0
"""Seconds a client has for its body."""
DRAIN_TIMEOUT_S = 10.0
"""Seconds for which the rest of a refused body is read and thrown away."""

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises TooLarge before buffering more than that, and ClientGone."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the body has {int(declared)} bytes; at most {limit} are allowed")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise TooLarge(f"the body has more than {limit} bytes, which is the most that is allowed")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds") from None


async def wait_disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection. For use after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`, and cancels it when the client goes away first; then raises ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class RefusedBody(Response):
    """An answer to a request whose body was not read: the rest is thrown away before the connection closes.

    A server that closes with unread data makes the client's kernel drop the answer with it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        asked_first = any(name == b"expect" for name, _ in scope["headers"])
        if not asked_first:
            await _drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
