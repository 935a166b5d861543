"""Python code on a thread, ended when it takes too long: chat templates are programs, and a thread cannot be killed."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TooLong(BaseException):
    """Raised inside the work when its time is over. No `except Exception` of the work's own holds it up."""


class _Running:
    """Which thread does the work now, if any. Both sides take the lock: nobody else's thread is ever interrupted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def begin(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()

    def end(self) -> None:
        with self._lock:
            if self._thread is not None:
                _raise_in(self._thread, None)  # what was not delivered yet must not reach what runs here next
            self._thread = None

    def interrupt(self) -> None:
        with self._lock:
            if self._thread is not None:
                _raise_in(self._thread, TooLong)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Makes the interpreter raise in a thread at its next instruction; None takes that back."""
    what = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


async def within(seconds: float, work: Callable[[], T]) -> T:
    """The work's result, from a thread. Raises TimeoutError when it took longer; then it has ended as well.

    It ends at its next Python instruction: one long call into C is not cut short.
    """
    running = _Running()

    def run() -> T:
        try:
            try:
                running.begin()
                return work()
            finally:
                running.end()
        except TooLong:
            raise TimeoutError(f"it took longer than {seconds:g} seconds") from None

    timer = asyncio.get_running_loop().call_later(seconds, running.interrupt)
    try:
        return await asyncio.to_thread(run)
    finally:
        timer.cancel()
