"""The thread that owns the engine: commands in order between steps, and an end that leaves nobody waiting."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest

from tandem.engine.output import StepOutput
from tandem.engine.sequence import SeqState
from tandem.engine.verification import CorruptKv
from tandem.errors import Internal, Unavailable
from tandem.testing.engine import make_seq, naive_continuation


class Rigs(Protocol):
    def __call__(
        self, pages: int = 64, page_size: int = 16, start: bool = True
    ) -> AbstractAsyncContextManager[Any]: ...


async def test_commands_run_in_order_on_one_other_thread(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        seen: list[tuple[int, int]] = []
        for number in range(10):
            rig.thread.post(lambda at=number: seen.append((at, threading.get_ident())))
        assert await rig.thread.call(lambda: len(seen)) == 10
        assert [number for number, _ in seen] == list(range(10))
        assert {ident for _, ident in seen} != {threading.get_ident()}
        assert len({ident for _, ident in seen}) == 1


async def test_a_command_s_exception_is_its_caller_s(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:

        def refuse() -> None:
            raise Unavailable("not now")

        with pytest.raises(Unavailable, match="not now"):
            await rig.thread.call(refuse)
        assert await rig.thread.call(int, "7") == 7
        assert rig.failures == []


async def test_kv_that_changed_under_a_command_ends_the_engine(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:

        def find() -> None:
            raise CorruptKv("KV has changed")

        with pytest.raises(CorruptKv):
            await rig.thread.call(find)
        with pytest.raises(Internal):
            await rig.thread.call(int, "7")
        assert [str(failure) for failure in rig.failures] == ["KV has changed"]


async def test_it_steps_while_there_is_work_and_reports_on_the_loop(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        idents = set()

        def on_step(output: StepOutput) -> None:
            rig.steps.append(output)
            idents.add(threading.get_ident())

        rig.thread._on_step = on_step
        seq = make_seq("a", range(10), max_tokens=5)
        rig.thread.post(rig.engine.add, seq)
        while sum(len(step.outputs) for step in rig.steps) < 5:
            await asyncio.sleep(0.001)
        tokens = [token for step in rig.steps for made in step.outputs for token in made.tokens]
        assert tokens == naive_continuation(range(10), seq.sampling)
        assert idents == {threading.get_ident()}
        count = len(rig.steps)
        await rig.thread.call(lambda: None)
        assert len(rig.steps) == count, "an idle engine does not step"


async def test_a_step_that_raises_ends_the_thread_and_whoever_waits(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        stepping, go_on = threading.Event(), threading.Event()

        def run(batch: Any, after: Any) -> Any:
            stepping.set()
            go_on.wait()
            raise MemoryError("no room")

        rig.runner.launch = run
        rig.thread.post(rig.engine.add, make_seq("a", range(10)))
        while not stepping.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(rig.thread.call(lambda: None))
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(Internal, match="the engine has failed"):
            await waiting
        with pytest.raises(Internal, match="the engine has stopped"):
            await rig.thread.call(lambda: None)
        assert [type(error) for error in rig.failures] == [MemoryError]


async def test_a_posted_command_that_raises_is_an_engine_failure(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        rig.thread.post(rig.engine.add, make_seq("a", ()))
        while not rig.failures:
            await asyncio.sleep(0.001)
        assert isinstance(rig.failures[0], ValueError)


async def test_stop_runs_what_was_asked_before_and_refuses_the_rest(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        asked = [asyncio.create_task(rig.thread.call(lambda at=number: at)) for number in range(3)]
        await asyncio.sleep(0)
        await rig.thread.stop()
        assert await asyncio.gather(*asked) == [0, 1, 2]
        with pytest.raises(Internal):
            await rig.thread.call(lambda: None)


async def test_a_caller_that_gave_up_does_no_harm(rig_maker: Rigs) -> None:
    async with rig_maker() as rig:
        go_on = threading.Event()
        ran: list[int] = []
        rig.thread.post(go_on.wait)
        call = asyncio.create_task(rig.thread.call(ran.append, 1))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        go_on.set()
        assert await rig.thread.call(lambda: list(ran)) == [1], "what was asked is done although nobody waits"
        assert rig.failures == []


async def test_it_does_not_spin_while_nothing_can_be_computed(rig_maker: Rigs) -> None:
    """All pages are reserved for KV under way: the queued sequence waits for a command, not for a turn of the loop."""
    async with rig_maker(pages=4) as rig:
        holder = make_seq("holder", range(60), max_tokens=1)
        holder.state = SeqState.WAITING_KV
        assert await rig.thread.call(rig.engine.reserve, holder) == 0
        rig.thread.post(rig.engine.add, make_seq("queued", range(100, 110), max_tokens=2))
        for _ in range(20):
            await rig.thread.call(lambda: None)
        assert len(rig.steps) <= 22, "one step for each command at most"
        assert not any(step.outputs for step in rig.steps)
        rig.thread.post(rig.engine.landed, holder, 0)
        finished: set[str] = set()
        while finished != {"holder", "queued"}:
            await asyncio.sleep(0.001)
            finished = {made.seq.seq_id for step in rig.steps for made in step.outputs if made.finish}


async def test_a_step_that_only_retracts_is_followed_by_another(rig_maker: Rigs) -> None:
    """An empty batch is no standstill when pages came free: without another step the sequence would wait for ever."""
    async with rig_maker(pages=8, start=False) as rig:
        seq = make_seq("a", range(20), max_tokens=8)
        rig.engine.add(seq)
        schedule, forced = rig.engine.scheduler.schedule, list[bool]()

        def once(now: float, timing: Any = None, ahead: bool = False) -> Any:
            if seq.output_len == 3 and not forced:
                forced.append(True)
                plan = type(schedule(now, timing))(0)
                rig.engine.scheduler.retract(seq, plan)
                return plan
            return schedule(now, timing)

        rig.engine.scheduler.schedule = once
        rig.thread.start()
        while not any(made.finish for step in rig.steps for made in step.outputs):
            await asyncio.sleep(0.001)
        await rig.thread.stop()
        empty = [step for step in rig.steps if not step.batch_tokens]
        assert [len(step.retracted) for step in empty] == [1]
        assert seq.tokens[20:] == naive_continuation(range(20), seq.sampling)
