"""The one thread that owns the engine. Everything else reaches the engine through `call` and `post`."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.errors import Internal

log = logging.getLogger(__name__)
T = TypeVar("T")
Command = Callable[[], None]


class EngineThread:
    """Runs `engine.step()` while there is work and sleeps on its inbox otherwise.

    Commands run between steps, in order. `on_step` and `on_failure` run on the event loop. A step that raises is not survivable:
    the engine's state is unknown, so the thread stops and `on_failure` is expected to end the process.
    """

    def __init__(
        self, engine: Engine, on_step: Callable[[StepOutput], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = False

    def start(self) -> None:
        """Starts the thread; call once."""
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step under way; commands not yet run fail with Internal."""
        self._stopped = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def post(self, command: Callable[..., object], *args: Any) -> None:
        """Runs `command(*args)` between steps without waiting for it; its failure is an engine failure."""
        self._inbox.put(lambda: command(*args) and None)

    async def call(self, command: Callable[..., T], *args: Any) -> T:
        """Runs `command(*args)` between steps and returns its result or raises its exception."""
        if self._stopped:
            raise Internal("the engine has stopped")
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = command(*args)
            except Exception as error:
                self._answer(future.set_exception, future, error)
            else:
                self._answer(future.set_result, future, result)

        self._inbox.put(run)
        return await future

    def _answer(self, setter: Callable[[Any], None], future: asyncio.Future[Any], value: object) -> None:
        def deliver() -> None:
            if not future.done():
                setter(value)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _run(self) -> None:
        try:
            stuck = False
            while self._drain(wait=stuck or not self._engine.has_work()):
                if self._engine.has_work():
                    output = self._engine.step()
                    # Nothing could be computed: only a command (pages given back, KV landed) can change that.
                    stuck = output.batch_tokens == 0
                    self._loop.call_soon_threadsafe(self._on_step, output)
        except BaseException as error:
            log.exception("the engine failed; this worker cannot go on")
            self._loop.call_soon_threadsafe(self._on_failure, error)

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
