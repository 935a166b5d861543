"""Publishes a worker's cache events and status to every router that watches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from tandem.cluster import CacheEvent, Status, WorkerUpdate
from tandem.engine.engine import Engine
from tandem.engine.output import EngineStatus
from tandem.worker.engine_thread import EngineThread
from tandem.worker.promises import Promises

log = logging.getLogger(__name__)
MAX_BACKLOG = 256
"""Updates a slow watcher may lag; past it, its subscription ends and it subscribes anew, with a snapshot."""
INTERVAL_S = 0.05
"""Least time between two publications: events batch, and an idle worker sends nothing."""
HEARTBEAT_S = 1.0
"""A status is sent at least so often."""

Item = tuple[tuple[CacheEvent, ...], Status | None]


class Publisher:
    """Fans one ordered stream of updates out to watchers. A watcher's numbers are consecutive from 0, the snapshot."""

    def __init__(
        self,
        incarnation: str,
        engine: Engine,
        thread: EngineThread,
        compose: Callable[[], Callable[[EngineStatus], Status]],
    ) -> None:
        """compose: called before the engine is asked, what it returns afterwards: the engine has all it names.

        `promises` are what the engine does not know of: routers hear of them at once.
        """
        self._incarnation = incarnation
        self._engine = engine
        self._thread = thread
        self._compose = compose
        self._watchers: dict[asyncio.Queue[Item], None] = {}
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._announced: list[CacheEvent] = []
        """Promises of this turn of the loop: a burst of requests is one update."""
        self.promises = Promises(self._announce)

    def poke(self) -> None:
        """Something changed: publish soon."""
        self._wake.set()

    async def run(self) -> None:
        """Publishes until cancelled."""
        while True:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            self._wake.clear()
            async with self._lock:
                await self._publish()
            await asyncio.sleep(INTERVAL_S)

    async def _publish(self) -> None:
        self.promises.seal()
        if self._watchers:
            composed = self._compose()
            events, status = await self._thread.call(self._drain)
            self._fan_out(((*events, *self.promises.taken_back()), composed(status)))
        else:
            self.promises.taken_back()

    async def watch(self) -> AsyncIterator[WorkerUpdate]:
        """One watcher's updates: a snapshot, then what follows it, without a gap between the two."""
        backlog: asyncio.Queue[Item] = asyncio.Queue(MAX_BACKLOG)
        async with self._lock:
            composed = self._compose()
            earlier, whole, status = await self._thread.call(self._drain_and_snapshot)
            self._fan_out((earlier, None))
            self._watchers[backlog] = None
            whole += self.promises.made()
        try:
            yield WorkerUpdate(self._incarnation, 0, whole, composed(status), snapshot=True)
            sequence = 0
            while backlog in self._watchers or not backlog.empty():
                events, latest = await backlog.get()
                sequence += 1
                yield WorkerUpdate(self._incarnation, sequence, events, latest)
        finally:
            self._watchers.pop(backlog, None)

    def _drain(self) -> tuple[tuple[CacheEvent, ...], EngineStatus]:
        return tuple(self._engine.drain_events()), self._engine.status()

    def _drain_and_snapshot(self) -> tuple[tuple[CacheEvent, ...], tuple[CacheEvent, ...], EngineStatus]:
        events, status = self._drain()
        return events, tuple(self._engine.snapshot_events()), status

    def _announce(self, events: tuple[CacheEvent, ...]) -> None:
        if not self._announced:
            asyncio.get_running_loop().call_soon(self._tell_announced)
        self._announced += events

    def _tell_announced(self) -> None:
        announced, self._announced = tuple(self._announced), []
        if announced:
            self._put((announced, None))

    def _fan_out(self, item: Item) -> None:
        self._tell_announced()
        self._put(item)

    def _put(self, item: Item) -> None:
        for backlog in list(self._watchers):
            try:
                backlog.put_nowait(item)
            except asyncio.QueueFull:
                log.warning("a watcher lags %d updates; its subscription ends", MAX_BACKLOG)
                del self._watchers[backlog]
