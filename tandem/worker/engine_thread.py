"""The one thread that owns the engine. Everything else reaches the engine through `call` and `post`."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.engine.verification import CorruptKv
from tandem.errors import Internal

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineThread:
    """Runs `engine.step()` while there is work and sleeps on its inbox otherwise.

    Commands run between steps, in order. `on_step` and `on_failure` run on the event loop. A step that raises is not
    survivable, since the engine's state is unknown: the thread ends, what waits for it gets Internal, and `on_failure`
    is expected to end the process.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
        slot: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """slot: what a step holds while it computes; see `ComputeSlots.held`."""
        self._engine = engine
        self._slot = slot
        self._on_step = on_step
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._calls: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ended = False

    def start(self) -> None:
        """Starts the thread; call once."""
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step and the commands under way; later ones are refused with Internal."""
        self._ended = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def post(self, command: Callable[..., object], *args: Any) -> None:
        """Runs `command(*args)` between steps without waiting for it; its failure is an engine failure."""
        self._inbox.put(lambda: command(*args))

    async def call(self, command: Callable[..., T], *args: Any) -> T:
        """Runs `command(*args)` between steps; its result or exception, or Internal when it cannot run any more."""
        if self._ended:
            raise Internal("the engine has stopped")
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                result = command(*args)
            except Exception as error:  # it is the caller's
                self._answer(future.set_exception, future, error)
                if isinstance(error, CorruptKv):  # and everybody's
                    raise
            else:
                self._answer(future.set_result, future, result)

        self._inbox.put(run)
        return await future

    def _answer(self, setter: Callable[[Any], None], future: asyncio.Future[Any], value: object) -> None:
        def deliver() -> None:
            if not future.done():
                setter(value)

        self._on_loop(deliver)

    def _on_loop(self, work: Callable[..., object], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work, *args)

    def _run(self) -> None:
        try:
            stuck = False
            while self._drain(wait=stuck or not self._engine.has_work()):
                if self._engine.has_work():
                    with self._slot():
                        output = self._engine.step()
                    # Then only a command (pages given back, KV landed) can change anything.
                    stuck = not output.advanced
                    self._on_loop(self._on_step, output)
        except BaseException as error:
            log.exception("the engine failed; this worker cannot go on")
            self._on_loop(self._fail, error)

    def _drain(self, wait: bool) -> bool:
        """Runs all commands there are, waiting for a first one if `wait`; False when told to stop."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _fail(self, error: BaseException) -> None:
        """On the event loop, after everything that the thread answered: nobody may wait for the rest."""
        self._ended = True
        for future in list(self._calls):
            if not future.done():
                future.set_exception(Internal("the engine has failed"))
        self._on_failure(error)
