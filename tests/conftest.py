"""What holds for every test: one compute thread, no network, repeatable examples, and nothing left behind.

A test fails when it leaves asyncio tasks, threads, processes or another log level behind. What a fixture of a wider
scope starts belongs to that fixture; what this one leaves behind when it ends is held against the test after which it
ended.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tandem.config import set_before_import

set_before_import({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
# Triton decides when it is imported; some of transformers' models import it where it is installed.
set_before_import({"TRITON_INTERPRET": "1"})

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")

GRACE_S = 3.0
"""How long what was told to end may take to do so."""
OUR_DAEMONS = ("tandem", "engine", "transfer")
"""Names of daemon threads that are ours: these must end too; other libraries' may go on."""
SHARED_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Started once by the standard library and kept until the interpreter ends."""

Processes = set[psutil.Process]
Threads = set[threading.Thread]
Running = tuple[Processes, Threads]


class Ledger:
    """Who started what runs now: the test, or a fixture of a wider scope."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self._level = logging.NOTSET
        self._before: Running = (set(), set())
        self._owned: dict[object, Running] = {}
        self._due: Running = (set(), set())
        self._seen: Processes = set()

    def begin(self) -> None:
        """Remembers what runs before a test."""
        self.tasks.clear()
        self._level = logging.getLogger().level
        self._before = running()
        self._due = (set(), set())

    def own(self, fixture: object, before: Running) -> None:
        """What was started since `before` may run until the fixture ends."""
        processes, threads = running()
        self._owned[fixture] = (processes - before[0], threads - before[1])

    def before_teardown(self) -> None:
        """Remembers families: when a parent was killed, nothing leads to its children any more."""
        self._seen, _ = running()
        for processes, _ in self._owned.values():
            processes |= {process for process in self._seen if processes.intersection(ancestors(process))}

    def disown(self, fixture: object) -> None:
        """The fixture has ended, and with it all that it owned must."""
        processes, threads = self._owned.pop(fixture, (set(), set()))
        self._due = (self._due[0] | processes, self._due[1] | threads)

    def left_behind(self) -> list[str]:
        """One line for each leak; processes are killed, so that the next test does not meet them."""
        deadline = time.monotonic() + GRACE_S
        while (leaks := self._leaks()) != (set(), set()) and time.monotonic() < deadline:
            time.sleep(0.02)
        processes, threads = leaks
        lines = [f"asyncio task {name}" for name in self.tasks]
        lines += [f"thread {thread.name}" for thread in threads]
        lines += [f"process {process.pid}: {command(process)}" for process in processes]
        if (level := logging.getLogger().level) != self._level:
            lines.append(f"the root logger at {logging.getLevelName(level)}")
            logging.getLogger().setLevel(self._level)
        for process in processes:
            process.kill()
        return lines

    def _leaks(self) -> Running:
        processes, threads = running()
        allowed = (set(self._before[0]), set(self._before[1]))
        for owned in self._owned.values():
            allowed[0].update(owned[0])
            allowed[1].update(owned[1])
        fresh = {p for p in (processes | self._seen) - allowed[0] if not allowed[0].intersection(ancestors(p))}
        due = {process for process in fresh | self._due[0] if alive(process)}
        return due, {thread for thread in (threads - allowed[1]) | self._due[1] if must_end(thread)}


def running() -> Running:
    """This process's descendants and threads."""
    return set(psutil.Process().children(recursive=True)), set(threading.enumerate())


def ancestors(process: psutil.Process) -> list[psutil.Process]:
    """Its parent, that one's parent, and so on up to this process; empty when it has ended."""
    try:
        parents = process.parents()
    except psutil.NoSuchProcess:
        return []
    own = psutil.Process()
    return parents[: parents.index(own)] if own in parents else parents


def must_end(thread: threading.Thread) -> bool:
    """Whether a thread left alive is a leak."""
    return thread.is_alive() and (not thread.daemon or thread.name.lower().startswith(OUR_DAEMONS))


def alive(process: psutil.Process) -> bool:
    """Whether it runs code of its own. A zombie only waits for its parent to ask for its exit status."""
    try:
        ended = process.status() == psutil.STATUS_ZOMBIE
        return process.is_running() and not ended and not any(name in command(process) for name in SHARED_PROCESSES)
    except psutil.NoSuchProcess:
        return False


def command(process: psutil.Process) -> str:
    """Its command line, shortened."""
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.NoSuchProcess:
        return "(ended)"


def record_tasks(
    cancel_all: Callable[[asyncio.AbstractEventLoop], None],
) -> Callable[[asyncio.AbstractEventLoop], None]:
    """Wraps the runner's last act before it closes its loop: tasks it would have to cancel are leaks."""

    def record(loop: asyncio.AbstractEventLoop) -> None:
        tasks = asyncio.all_tasks(loop)
        if tasks:
            _, pending = loop.run_until_complete(asyncio.wait(tasks, timeout=0.2))
            LEDGER.tasks.extend(f"{task.get_name()}: {task.get_coro()!r}" for task in pending)
        cancel_all(loop)

    return record


LEDGER = Ledger()
# There is no public hook between a test's last fixture and the cancellation of its tasks.
setattr(asyncio.runners, "_cancel_all_tasks", record_tasks(getattr(asyncio.runners, "_cancel_all_tasks")))  # noqa: B009, B010


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """For tests that set up logging as a process does: what that changes is changed back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hooks = sys.excepthook, threading.excepthook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    LEDGER.begin()
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    if fixturedef.scope == "function":
        return (yield)
    before = running()
    result = yield
    LEDGER.own(fixturedef, before)
    return result


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any]) -> None:
    LEDGER.disown(fixturedef)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    LEDGER.before_teardown()
    yield
    if leaks := LEDGER.left_behind():
        gc.collect()  # what the leak kept alive complains now, and not in the next test
        pytest.fail(f"{item.name} left running:\n" + "\n".join(f"  {leak}" for leak in leaks), pytrace=False)
