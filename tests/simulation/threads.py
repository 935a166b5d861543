"""The workers' two threads as turns of the virtual loop: what they do is the shipped code's, when is drawn.

Only the loops that sleep on a queue are replaced. A step's results come after the time that the step is said to take,
and whatever crosses between a thread and the event loop may wait a while: that is where real threads race.
"""

from __future__ import annotations

import asyncio
import queue
import types
from collections.abc import Callable
from typing import Any

from kvtransfer.transfer_thread import TransferThread
from tandem.worker.engine_thread import EngineThread
from tests.simulation.loop import VirtualLoop


def virtual() -> VirtualLoop:
    """The loop that runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


class _Thread:
    """`threading.Thread` for work that ends: it is done a while after its start."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...] = (), **_: object) -> None:
        self._work = target, args

    def start(self) -> None:
        target, args = self._work
        virtual().later(0.0005, 0.03, target, *args)


THREADING = types.SimpleNamespace(Thread=_Thread)
"""Stands in for the module `threading` where threads are started for single calls."""


class _Alive:
    """Answers what is asked of the thread itself."""

    def __init__(self) -> None:
        self.alive = False

    def is_alive(self) -> bool:
        return self.alive

    def join(self, timeout: float | None = None) -> None:
        self.alive = False


class _Inbox(queue.SimpleQueue[Any]):
    """Wakes the thread that sleeps on it."""

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._wake()


class SimEngineThread(EngineThread):
    """One step after the other; commands run between them."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._inbox = _Inbox(self._wake)
        self._thread = _Alive()  # type: ignore[assignment]
        self._due = self._stuck = False

    def start(self) -> None:
        """Runs from now on."""
        self._thread.alive = True  # type: ignore[attr-defined]
        self._wake()

    async def stop(self) -> None:
        """As the thread's."""
        self._ended = True
        self._inbox.put(None)
        while self._thread.is_alive():
            await virtual().passes(0.001)

    def _wake(self) -> None:
        if not self._due and self._thread.is_alive():
            self._due = True
            virtual().later(0.00005, 0.001, self._turn)

    def _turn(self) -> None:
        try:
            if not self._drain(wait=False):
                self._thread.join()
                return
            if self._engine.has_work() and not self._stuck:
                output = self._engine.step()
                self._stuck = not output.advanced
                virtual().later(*virtual().step_s, self._after, output)
                return
        except BaseException as error:  # noqa: BLE001 - as the thread does
            self._thread.join()
            virtual().failures.append(f"the engine failed: {error!r}")
            self._on_loop(self._fail, error)
            return
        self._due = False

    def _after(self, output: Any) -> None:
        self._on_loop(self._on_step, output)
        self._due = False
        self._wake()

    def _drain(self, wait: bool) -> bool:
        self._stuck = self._stuck and self._inbox.empty()
        return super()._drain(wait)


class SimTransferThread(TransferThread):
    """Jobs and polls, each a while after it became due."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._thread = _Alive()  # type: ignore[assignment]
        self._due = False

    def start(self) -> None:
        """Runs from now on."""
        self._thread.alive = True  # type: ignore[attr-defined]

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops, as the thread does."""
        self._thread.join()
        while not self._inbox.empty():
            self._inbox.get()()
        self._fail_writes(lambda write: True, "the worker is closing")

    def _submit(self, job: Callable[[], None]) -> None:
        super()._submit(job)
        self._wake()

    def _wake(self) -> None:
        if not self._due:
            self._due = True
            virtual().later(0.00005, 0.004, self._turn)

    def _turn(self) -> None:
        self._due = False
        if not self._thread.is_alive():
            return
        while not self._inbox.empty():
            self._inbox.get()()
        _, busy = self._poll()
        if busy:
            self._wake()
