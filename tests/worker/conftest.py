"""An engine without torch, and the thread that owns it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.engine.policy import EngineConfig
from tandem.testing.engine import FakePool, FakeRunner
from tandem.worker.engine_thread import EngineThread


@dataclass
class Rig:
    """An engine with its thread, and what that reported."""

    engine: Engine
    runner: FakeRunner
    thread: EngineThread = field(init=False)
    steps: list[StepOutput] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.engine, self.steps.append, self.failures.append)


RigMaker = Callable[..., AbstractAsyncContextManager[Rig]]


@asynccontextmanager
async def make_rig(pages: int = 64, page_size: int = 16, start: bool = True) -> AsyncIterator[Rig]:
    pool = FakePool(pages, page_size)
    runner = FakeRunner(pool)
    rig = Rig(Engine(runner, pool, EngineConfig()), runner)
    if start:
        rig.thread.start()
    try:
        yield rig
    finally:
        if start:
            await rig.thread.stop()


@pytest.fixture
def rig_maker() -> RigMaker:
    return make_rig
