"""The one thread of a worker that touches transports: it posts writes, polls them, and takes what has landed.

It sleeps while nothing is open, and polls every half millisecond while something is. The event loop reaches it through a
bounded inbox; results go back with `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvtransfer.base import Buffer, Link, TransportError
from kvtransfer.manifest import Manifest, digest
from tandem.errors import Overloaded, Unavailable

T = TypeVar("T")


class Watched(Protocol):
    """Something the thread polls while it is busy."""

    @property
    def busy(self) -> bool:
        """Whether it needs polling now."""
        ...

    def poll(self) -> bool:
        """Does what there is to do; whether there was anything. Must not raise."""
        ...


@dataclass(slots=True)
class _Write:
    """A posted write and who waits for it."""

    link: Link
    handle: Any
    started: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[float]


def _settle(future: asyncio.Future[T], result: T | None, error: BaseException | None) -> None:
    """Completes a future on its own loop, unless its waiter is gone."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # type: ignore[arg-type]


def _answer(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], result: T | None, error: BaseException | None = None
) -> None:
    """`_settle` from another thread; a loop that is closed has nobody waiting."""
    try:
        loop.call_soon_threadsafe(_settle, future, result, error)
    except RuntimeError:
        if not loop.is_closed():
            raise


async def in_thread(work: Callable[[], T], discard: Callable[[T], object] | None = None) -> T:
    """Runs blocking work on a daemon thread of its own, so that a transport that hangs cannot keep the process alive.

    When the waiter is cancelled, `discard` gets the result on that thread: nothing that was made is lost.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    lock, abandoned = threading.Lock(), False
    made: list[T] = []

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the waiter, whatever it is
            _answer(loop, future, None, error)
            return
        with lock:
            made.append(result)
            unwanted = abandoned
        if not unwanted:
            _answer(loop, future, result)
        elif discard is not None:
            discard(result)

    threading.Thread(target=run, name="transfer-blocking", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        with lock:
            abandoned = True
        if made and discard is not None:
            threading.Thread(target=discard, args=(made[0],), name="transfer-discard", daemon=True).start()
        raise


class TransferThread:
    """Start once, `close` once. All methods but the thread's own are called on the event loop."""

    def __init__(self, name: str = "transfer", poll_s: float = 0.0005, inbox: int = 4096) -> None:
        self._poll_s = poll_s
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue(inbox)
        self._watched: list[Watched] = []
        self._writes: list[_Write] = []
        self._running = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.polls = 0
        """Rounds of polling so far; it stands still while the thread sleeps."""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops the thread and fails what was still under way."""
        self._submit(self._stop)
        self._thread.join(timeout_s)

    @property
    def open_writes(self) -> int:
        """Writes posted and not terminal."""
        return len(self._writes)

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` on the thread. Raises what it raises, Overloaded when the inbox is full."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - handed to the waiter
                _answer(loop, future, None, error)
            else:
                _answer(loop, future, result)

        self._submit(job)
        return await future

    async def write(self, link: Link, view: Buffer, offset: int, manifest: Manifest) -> float:
        """Digests `view`, writes it to the slab's `offset`, and returns the seconds it took once it is complete.

        The manifest's digest is filled in here. Raises TransportError; then the link must be closed, because nothing is
        known about its other writes.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()

        def job() -> None:
            started = time.monotonic()
            try:
                packed = Manifest(
                    manifest.ticket_id, manifest.attempt, manifest.sequence, manifest.start, manifest.count,
                    view.nbytes, digest(view),
                ).pack()  # fmt: skip
                handle = link.post(view, offset, packed)
            except Exception as error:  # noqa: BLE001 - handed to the waiter
                _answer(loop, future, None, error)
            else:
                self._writes.append(_Write(link, handle, started, loop, future))

        self._submit(job)
        return await future

    async def attach(self, watched: Watched) -> None:
        """Polls `watched` whenever it is busy. Call `wake` when it becomes so."""
        await self.call(lambda: self._watched.append(watched))

    async def detach(self, watched: Watched) -> None:
        """After this returned, `watched` is not touched any more."""
        await self.call(lambda: self._watched.remove(watched) if watched in self._watched else None)

    async def abandon(self, link: Link) -> None:
        """Fails the open writes of a link; after this returned the thread does not touch the link any more."""
        await self.call(lambda: self._fail_writes(lambda write: write.link is link, "the link was closed"))

    def wake(self) -> None:
        """Makes the thread look again at what is busy."""
        try:
            self._inbox.put_nowait(lambda: None)
        except queue.Full:
            return  # a full inbox wakes it as well

    def _submit(self, job: Callable[[], None]) -> None:
        if not self._thread.is_alive():
            raise Unavailable("the transfer thread has ended")
        try:
            self._inbox.put_nowait(job)
        except queue.Full:
            raise Overloaded(f"the transfer thread has {self._inbox.maxsize} jobs waiting") from None

    def _stop(self) -> None:
        self._running = False
        self._fail_writes(lambda write: True, "the worker is closing")

    def _fail_writes(self, which: Callable[[_Write], bool], reason: str) -> None:
        failed = [write for write in self._writes if which(write)]
        self._writes = [write for write in self._writes if not which(write)]
        for write in failed:
            _answer(write.loop, write.future, None, TransportError(reason))

    def _run(self) -> None:
        while self._running:
            progress, busy = self._poll()
            try:
                if progress:
                    job = self._inbox.get_nowait()
                else:
                    job = self._inbox.get(timeout=self._poll_s if busy else None)
            except queue.Empty:
                continue
            job()

    def _poll(self) -> tuple[bool, bool]:
        """One round: (something happened, something is still open)."""
        open_before, progress, busy = len(self._writes), False, bool(self._writes)
        if self._writes:
            self._writes = [write for write in self._writes if not self._finish(write)]
        for watched in self._watched:
            if watched.busy:
                busy = True
                progress = watched.poll() or progress
        self.polls += busy
        return progress or len(self._writes) < open_before, busy

    def _finish(self, write: _Write) -> bool:
        try:
            if not write.link.poll(write.handle):
                return False
        except Exception as error:  # noqa: BLE001 - handed to the waiter
            _answer(write.loop, write.future, None, error)
            return True
        _answer(write.loop, write.future, time.monotonic() - write.started)
        return True
