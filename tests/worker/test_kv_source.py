"""Exports of a ticket whose pages are taken back and computed again meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tandem.kv import HashRoot, Span
from tandem.worker.kv_source import EngineKvSource, _Held


class Thread:
    """An engine thread that runs what it is asked when told to, and answers when told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[asyncio.Future[Any], Any]] = []

    def call(self, command: Any, *args: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self.asked.append((future, lambda: command(*args)))
        return future

    def answer(self) -> None:
        """Runs and answers all there is."""
        while self.asked:
            future, run = self.asked.pop(0)
            future.set_result(run())


async def test_an_export_hears_of_what_is_computed_again_although_another_begins() -> None:
    thread: Any = Thread()
    seq: Any = SimpleNamespace(seq_id="t", computed=128)
    engine: Any = SimpleNamespace(export_span=lambda *args: None)
    source = EngineKvSource(engine, thread, HashRoot("", "", ""), 1000, computes=True)
    source._held["t"] = _Held(seq, lambda computed: None, computes=True)
    source._report("t", 128)
    first = asyncio.create_task(source.export("t", Span(0, 64), memoryview(b"")))
    await asyncio.sleep(0)
    future, run = thread.asked.pop()
    seq.computed = 0  # given to an older sequence in the step under way
    missing = run()
    seq.computed = 128  # and computed again in the next

    def step(**output: Any) -> None:
        told: Any = SimpleNamespace(**{"retracted": [], "progress": [], **output})
        source.on_step(told)

    loop = asyncio.get_running_loop()  # it was busy: the answer, both steps and another export are ready at once
    loop.call_soon(future.set_result, missing)
    loop.call_soon(lambda: step(retracted=[seq]))
    loop.call_soon(lambda: step(progress=[SimpleNamespace(seq=seq, computed=128)]))
    second = asyncio.create_task(source.export("t", Span(64, 64), memoryview(b"")))
    async with asyncio.timeout(5.0):
        while not (first.done() and second.done()):
            thread.answer()
            await asyncio.sleep(0)
