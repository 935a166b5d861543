"""Python code on a thread, ended when it takes too long: chat templates are programs, and a thread cannot be killed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TooLong(BaseException):
    """Raised inside the work when its time is over. No `except Exception` of the work's own holds it up."""


class _Running:
    """Which thread does the work now, if any. Both sides take the lock: nobody else's thread is ever interrupted.

    The time runs while the work does, and not while it waits for a thread; nor does it stop when nobody waits any more.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # of the loop's thread alone
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._unwanted = False

    def begin(self) -> None:
        with self._lock:
            if self._unwanted:
                raise asyncio.CancelledError
            self._thread = threading.get_ident()
        self._loop.call_soon_threadsafe(self._start_timer)

    def end(self) -> None:
        with self._lock:
            if self._thread is not None:
                _raise_in(self._thread, None)  # what was not delivered yet must not reach what runs here next
            self._thread = None
        with contextlib.suppress(RuntimeError):  # a closed loop has no timers
            self._loop.call_soon_threadsafe(self._stop_timer)

    def abandon(self) -> None:
        """Nobody waits for it: it need not begin. What has begun keeps its time."""
        with self._lock:
            self._unwanted = True

    def _start_timer(self) -> None:
        self._timer = self._loop.call_later(self._seconds, self._interrupt)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self) -> None:
        with self._lock:
            if self._thread is not None:
                _raise_in(self._thread, TooLong)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Makes the interpreter raise in a thread at its next instruction; None takes that back."""
    what = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


async def within(seconds: float, work: Callable[[], T]) -> T:
    """The work's result, from a thread. Raises TimeoutError when it took longer; then it has ended as well.

    Only the work's own time counts. Who is cancelled leaves it to its time; what has not begun by then never does.
    It ends at its next Python instruction: one long call into C is not cut short.
    """
    running = _Running(seconds)

    def run() -> T:
        try:
            try:
                running.begin()
                return work()
            finally:
                running.end()
        except TooLong:
            raise TimeoutError(f"it took longer than {seconds:g} seconds") from None

    try:
        return await asyncio.to_thread(run)
    finally:
        running.abandon()
