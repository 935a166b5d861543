"""An event loop in virtual time that several simulated processes share, in one thread.

Time stands still while anything is ready, and else jumps to the next timer: a minute of leases and deadlines takes
milliseconds. Callbacks run in the order asyncio promises; what the world decides (latencies, threads, how late a turn
of the loop comes) is drawn from the loop's seeded generator. So a seed replays exactly.

Every callback carries the context it was made in, and the context names the `Node`, the simulated process, that it
belongs to. That is all it takes to kill a process (its callbacks are dropped, no `finally` runs) or to stop it (its
callbacks wait until it goes on, while time passes).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
from asyncio.events import Handle, _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from random import Random
from typing import Any

NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
MANY = 100
MAX_STEPS = 3_000_000
LAGS = (0.0, 0.0, 0.0, 0.0002, 0.0002, 0.001, 0.005)
"""Seconds by which a turn of the loop may come late."""


class Stuck(AssertionError):
    """Nothing will ever happen again, or things happen without end."""


class State(Enum):
    """Of a simulated process."""

    RUNNING = "running"
    STOPPED = "stopped"
    """By SIGSTOP."""
    DEAD = "dead"


class Node:
    """A simulated process. What is started in its context belongs to it."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.state = State.RUNNING
        self.context = contextvars.copy_context()
        self.context.run(NODE.set, self)
        self.signals: dict[int, Callable[[], object]] = {}
        self.on_death: list[Callable[[], None]] = []
        self._loop = loop
        self._held: list[Handle] = []

    @property
    def dead(self) -> bool:
        """Whether it has been killed, or has ended."""
        return self.state is State.DEAD

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task of this process."""
        return self._loop.create_task(work, context=self.context)

    def hold(self, handle: Handle) -> None:
        """A callback of a process that does not run: for later, or for never."""
        if self.state is State.STOPPED:
            self._held.append(handle)

    def stop(self) -> None:
        """SIGSTOP."""
        if self.state is State.RUNNING:
            self.state = State.STOPPED

    def go_on(self) -> None:
        """SIGCONT: what became due meanwhile runs now."""
        if self.state is State.STOPPED:
            self.state = State.RUNNING
            self._loop.resume(self._held)
            self._held = []

    def signal(self, number: int) -> None:
        """Delivers a signal that the process handles; it waits while the process is stopped."""
        if not self.dead and number in self.signals:
            self._loop.call_soon(self.signals[number], context=self.context)

    def kill(self) -> None:
        """SIGKILL, or the end of the process: nothing of it runs any more, and the kernel closes its connections."""
        if not self.dead:
            self.state = State.DEAD
            self._held.clear()
            for notice in self.on_death:
                notice()


class _Task(asyncio.Task[Any]):
    """A task whose place in sets does not depend on its address."""

    def __init__(self, number: int, work: Any, **more: Any) -> None:
        self._number = number  # first: asyncio puts the task into a set
        super().__init__(work, **more)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class VirtualLoop(asyncio.BaseEventLoop):
    """See above. `failures` collects what nobody caught."""

    _ready: deque[Any]
    _scheduled: list[Any]
    _stopping: bool
    _timer_cancelled_count: int

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)
        self.steps = 0
        self.failures: list[str] = []
        self.rpc: Any = None
        """Who makes channels and servers."""
        self.step_s = (0.001, 0.01)
        """How long an engine's step takes."""
        self.watchers: list[Callable[[], None]] = []
        """Called after every turn of the loop."""
        self._now = 0.0
        self._tasks: list[_Task] = []
        self.set_exception_handler(self._note)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def node(self) -> Node | None:
        """The process that runs now."""
        return NODE.get()

    def resume(self, handles: list[Handle]) -> None:
        """Makes callbacks ready again."""
        self._ready.extend(handles)

    def passes(self, seconds: float) -> asyncio.Future[None]:
        """Awaits virtual seconds. Nobody waits for it."""
        future = self.create_future()
        self.call_later(seconds, _settle, future)
        return future

    def later(
        self, least: float, most: float, work: Callable[..., object], *args: Any, node: Node | None = None
    ) -> None:
        """Calls after a drawn time, in the context of `node` or of who asks."""
        delay = self.random.uniform(least, most)
        self.call_later(delay, work, *args, context=None if node is None else node.context)

    # What asyncio asks of a loop -------------------------------------------------------------------------------------

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> _Task:  # type: ignore[override]
        """Tasks are numbered, and kept: one of a dead process must not be collected at any odd moment."""
        self._check_closed()
        task = _Task(len(self._tasks), coro, loop=self, name=name or f"task-{len(self._tasks)}", context=context)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Threads take a drawn time, and then their work is done at once."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - it is the waiter's
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.later(0.0005, 0.02, work)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """For the process that runs now."""
        node = NODE.get()
        assert node is not None
        node.signals[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        """The inverse."""
        node = NODE.get()
        assert node is not None
        return node.signals.pop(sig, None) is not None

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        node, error = NODE.get(), context.get("exception")
        self.failures.append(f"{node.name if node else 'world'}: {context['message']}: {error!r}")

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector here."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _run_once(self) -> None:
        if self._timer_cancelled_count > MANY:
            # Deadlines that were met would else be most of what is scheduled.
            self._scheduled = [handle for handle in self._scheduled if not handle._cancelled]
            heapq.heapify(self._scheduled)
            self._timer_cancelled_count = 0
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready and not self._stopping:
            if not scheduled:
                raise Stuck("nothing is left that could happen")
            # Loops lag: then several things are due in one turn, and nobody could react to one before the next.
            self._now = max(self._now, scheduled[0]._when) + self.random.choice(LAGS)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            node = handle._context.get(NODE)
            if node is not None and node.state is not State.RUNNING:
                node.hold(handle)
                continue
            self.steps += 1
            handle._run()
        for watch in self.watchers:
            watch()
        if self.steps > MAX_STEPS:
            raise Stuck(f"{MAX_STEPS} callbacks in {self._now:.1f} virtual seconds")

    def _check_closed(self) -> None:
        """Generators of dead processes are collected after the end, and may still ask for something."""

    def end(self) -> None:
        """Ends what dead processes left behind, silently, and closes the loop."""
        _set_running_loop(self)
        try:
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    _close(task.get_coro())
        finally:
            _set_running_loop(None)
        self._ready.clear()
        self._scheduled.clear()
        self._tasks.clear()
        self.close()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close(work: Any) -> None:
    """Ends a coroutine that will never be run again; what its `finally` blocks say to that is no matter."""
    with contextlib.suppress(BaseException):  # a process that was killed has nothing to say
        work.close()
