"""Whether KV can really travel: a small page goes from this worker to itself over its transport, now and then.

A process can look well, answer every call and hold its leases while its transport has broken for good; elsewhere whole
fleets stayed green like this. A worker whose page does not arrive is not ready; one that keeps losing them ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from prometheus_client import Counter

from tandem.cluster import new_id
from tandem.errors import Unavailable

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
LIMIT_S = 10.0
"""A page that has not arrived by then is lost."""
RETRY_S = 2.0
"""Between probes while they fail."""
LAST = 5
"""So many lost in a row end the worker: it has tried for a minute, and a new process has a new transport."""
POLL_S = 0.001


class Transport(Protocol):
    """See `kvtransfer.base.Backend`: the part that is used here."""

    @property
    def name(self) -> str:
        """What it is called."""

    def landing(self, me: str, peer: str, slab_bytes: int) -> Any:
        """Memory that a peer can write."""

    def link(self, me: str, peer: str, staging: Any) -> Any:
        """A way to write it."""


def send_page(transport: Transport, limit_s: float = LIMIT_S) -> None:
    """Sends a page of random bytes to a landing of its own, all made for the purpose. Blocks. Raises Unavailable."""
    me, peer = new_id(), new_id()
    page = np.frombuffer(secrets.token_bytes(PAGE_BYTES), dtype=np.uint8).copy()
    landing = transport.landing(me, peer, PAGE_BYTES)
    try:
        landing.guard(lambda offset, length: True)
        link = transport.link(peer, me, page)
        try:
            link.connect(landing.metadata())
            manifest = new_id().encode()
            arrived = _arrive(landing, link, link.post(page, 0, manifest), limit_s)
        finally:
            link.close()
        if arrived != [manifest] or not np.array_equal(landing.memory[:PAGE_BYTES], page):
            raise Unavailable("what arrived is not what was sent")
    finally:
        landing.close()


def _arrive(landing: Any, link: Any, handle: Any, limit_s: float) -> list[bytes]:
    """What landed, once the write is complete and something has."""
    until, sent = time.monotonic() + limit_s, False
    arrived: list[bytes] = []
    while not (sent and arrived):
        if time.monotonic() > until:
            raise Unavailable(f"a page did not arrive within {limit_s:g} seconds")
        sent = sent or link.poll(handle)
        arrived += landing.poll()
        time.sleep(POLL_S)
    return arrived


class SelfProbe:
    """Probes once with `check`, then for ever with `run`. All methods run on the event loop.

    changed: told when `ready` changes. give_up: told why the worker must end. counted: probes by outcome.
    """

    def __init__(
        self,
        transport: Transport,
        every_s: float,
        changed: Callable[[], None],
        give_up: Callable[[str], None],
        retry_s: float = RETRY_S,
        counted: Counter | None = None,
    ) -> None:
        self.ready = False
        """Whether the last page arrived."""
        self._transport = transport
        self._every_s = every_s
        self._changed = changed
        self._give_up = give_up
        self._retry_s = retry_s
        self._counted = counted

    async def check(self) -> None:
        """Sends a page. Raises Unavailable when it does not arrive, for whatever reason."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                send_page(self._transport)
            except Exception as error:  # noqa: BLE001 - handed to the waiter
                future.set_exception(error)
            else:
                future.set_result(None)

        # A daemon: a transport that hangs must not keep the process.
        threading.Thread(target=work, name="transfer-probe", daemon=True).start()
        try:
            async with asyncio.timeout(2 * LIMIT_S):
                await asyncio.shield(asyncio.wrap_future(future))
        except Exception as error:
            self.ready = False
            self._count("lost")
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unavailable(f"the KV transport {self._transport.name} moves no page: {reason}") from error
        self.ready = True
        self._count("arrived")

    def _count(self, outcome: str) -> None:
        if self._counted is not None:
            self._counted.labels(outcome).inc()

    async def run(self) -> None:
        """Probes rarely; ends by giving up."""
        lost = 0
        while lost < LAST:
            await asyncio.sleep(self._retry_s if lost else self._every_s)
            was = self.ready
            try:
                await self.check()
                lost = 0
            except Unavailable as error:
                lost += 1
                log.error("%s; this worker is not ready (%d of %d)", error, lost, LAST)
            if self.ready != was:
                self._changed()
        self._give_up(f"{LAST} pages in a row did not arrive over the KV transport {self._transport.name}")
        await asyncio.Event().wait()
