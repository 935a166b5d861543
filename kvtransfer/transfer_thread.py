"""The one thread of a worker that touches transports: it posts writes, polls them, and takes what has landed.

It sleeps while nothing is open, and polls every half millisecond while something is. The event loop reaches it through
a bounded inbox and waits for its answers as futures.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvtransfer.arrivals import Arrivals
from kvtransfer.base import Buffer, Link, TransportError
from kvtransfer.manifest import Manifest, digest
from tandem.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Write:
    """A posted write and who waits for its seconds."""

    link: Link
    handle: Any
    started: float
    future: Future[float]


def _running() -> Future[Any]:
    """A future that is settled even when its waiter was cancelled."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - handed to the waiter
        future.set_exception(error)


async def in_thread(work: Callable[[], T], discard: Callable[[T], object] = lambda _: None) -> T:
    """Runs blocking work on a daemon thread of its own, so that a transport that hangs cannot keep the process alive.

    When the waiter is cancelled, `discard` gets the result: nothing that was made is lost.
    """
    future: Future[T] = _running()
    threading.Thread(target=_settle, args=(future, work), name="transfer-blocking", daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(lambda done: None if done.exception() else discard(done.result()))
        raise


class TransferThread:
    """Start once, `close` once. All public methods are called on the event loop."""

    def __init__(self, name: str = "transfer", poll_s: float = 0.0005, inbox: int = 4096) -> None:
        self._poll_s = poll_s
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue(inbox)
        self._watched: list[Arrivals] = []
        self._writes: list[_Write] = []
        self._running = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.polls = 0
        """Rounds of polling so far; it stands still while the thread sleeps."""

    @property
    def open_writes(self) -> int:
        """Writes posted and not terminal."""
        return len(self._writes)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops the thread, fails what is under way, and waits until it has ended or `timeout_s` passed."""
        self._submit(self._stop)
        self._thread.join(timeout_s)

    async def write(self, link: Link, view: Buffer, offset: int, manifest: Manifest) -> float:
        """Digests `view`, writes it to the slab's `offset`, and returns the seconds it took once it is complete.

        The manifest's digest is filled in here. Raises TransportError; then the link must be closed, because nothing is
        known about its other writes.
        """
        future = _running()

        def job() -> None:
            started = time.monotonic()
            try:
                handle = link.post(view, offset, replace(manifest, digest=digest(view)).pack())
            except Exception as error:  # noqa: BLE001 - handed to the waiter
                future.set_exception(error)
            else:
                self._writes.append(_Write(link, handle, started, future))

        self._submit(job)
        return float(await asyncio.wrap_future(future))

    async def attach(self, arrivals: Arrivals) -> None:
        """Polls a landing whenever a grant is out. Call `wake` when the first one goes out."""
        await self._call(lambda: self._watched.append(arrivals))

    async def detach(self, arrivals: Arrivals) -> None:
        """After this returned, the landing is not touched any more."""
        await self._call(lambda: self._watched.remove(arrivals) if arrivals in self._watched else None)

    async def abandon(self, link: Link) -> None:
        """Fails the open writes of a link; after this returned the thread does not touch the link any more."""
        await self._call(lambda: self._fail_writes(lambda write: write.link is link, "the link was closed"))

    def wake(self) -> None:
        """Makes the thread look again at what is busy."""
        if not self._inbox.full():  # a full inbox wakes it as well
            self._submit(lambda: None)

    async def _call(self, work: Callable[[], None]) -> None:
        if self._thread.is_alive():  # a thread that has ended touches nothing
            future = _running()
            self._submit(lambda: _settle(future, work))
            await asyncio.wrap_future(future)

    def _submit(self, job: Callable[[], None]) -> None:
        if not self._thread.is_alive():
            raise Unavailable("the transfer thread has ended")
        try:
            self._inbox.put_nowait(job)
        except queue.Full:
            raise Overloaded(f"the transfer thread has {self._inbox.maxsize} jobs waiting") from None

    def _stop(self) -> None:
        self._running = False

    def _fail_writes(self, which: Callable[[_Write], bool], reason: str) -> None:
        failed = [write for write in self._writes if which(write)]
        self._writes = [write for write in self._writes if not which(write)]
        for write in failed:
            write.future.set_exception(TransportError(reason))

    def _run(self) -> None:
        while self._running:
            progress, busy = self._poll()
            try:
                job = self._inbox.get(not progress, self._poll_s if busy else None)
            except queue.Empty:
                continue
            job()
        while not self._inbox.empty():
            self._inbox.get()()
        self._fail_writes(lambda write: True, "the worker is closing")

    def _poll(self) -> tuple[bool, bool]:
        """One round: (something happened, something is still open)."""
        busy = bool(self._writes)
        finished = [write for write in self._writes if self._finished(write)]
        if finished:
            self._writes = [write for write in self._writes if write not in finished]
        progress = bool(finished)
        for arrivals in self._watched:
            if arrivals.outstanding:
                busy = True
                progress = arrivals.poll() or progress
        self.polls += busy
        return progress, busy

    def _finished(self, write: _Write) -> bool:
        try:
            if not write.link.poll(write.handle):
                return False
            write.future.set_result(time.monotonic() - write.started)
        except Exception as error:  # noqa: BLE001 - handed to the waiter
            write.future.set_exception(error)
        return True
