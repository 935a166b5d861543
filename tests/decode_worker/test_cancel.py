"""A request can be cancelled in every phase: it ends once, and nothing of it stays (`pair` checks that at the end)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvtransfer.backends.inproc import InprocBackend
from tandem.cluster import new_id
from tandem.kv import Span
from tandem.testing.pair import Pair, pair
from tandem.types import FinishReason, GenerateRequest, SamplingParams
from tandem.wire.v1 import decode_pb2

LONG = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
MIDDLING = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True)
PROMPT = tuple(range(10, 210))


async def until(workers: Pair, **status: int) -> None:
    """Waits until the decode worker's engine is in this state."""
    while True:
        now = await workers.decode.thread.call(workers.decode.engine.status)
        if all(getattr(now, name) == value for name, value in status.items()):
            return
        await asyncio.sleep(0.005)


class Gate:
    """Holds a prefill worker's exports back after the first one."""

    def __init__(self, workers: Pair, patch: pytest.MonkeyPatch, index: int = 0, free: int = 1) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        source = workers.prefill[index].services._engine_source  # type: ignore[attr-defined]
        export, passed = source.export, list[Span]()

        async def gated(ticket: str, span: Span, out: Any) -> None:
            if len(passed) >= free:
                self.reached.set()
                await self.open.wait()
            passed.append(span)
            await export(ticket, span, out)

        patch.setattr(source, "export", gated)


def hold_engine(workers: Pair) -> Callable[[], None]:
    """The decode worker's engine thread does nothing until the returned function is called."""
    go_on = threading.Event()
    workers.decode.thread.post(go_on.wait)
    return go_on.set


async def known(workers: Pair, name: str) -> None:
    """Waits until the decode worker has the request's record."""
    while name not in workers.decode.services.worker._requests:  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)


async def cancelled(workers: Pair, name: str) -> None:
    """Cancels a request that runs, and checks that it ended so, once."""
    assert await workers.cancel(name)
    (answer,) = await workers.answer(name)
    assert answer.finish is FinishReason.CANCELLED
    assert not await workers.cancel(name)


async def test_queued(small_model: Path) -> None:
    async with pair(small_model, prefill=0, max_running=1) as workers:
        first = await workers.submit(PROMPT, LONG)
        await workers.tokens(first, 1)
        queued = await workers.submit(PROMPT[:50], SHORT)
        await until(workers, running=1, waiting=1)
        await cancelled(workers, queued)
        await cancelled(workers, first)
        (answer,) = await workers.generate(PROMPT, SHORT)
        assert answer.finish is FinishReason.LENGTH


async def test_waiting_for_pages(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waits is cancelled, the next in the line gets its turn, and who holds the pages goes on."""
    async with pair(small_model, decode_settings={"pages": 24}) as workers:
        gate = Gate(workers, monkeypatch, free=0)
        holder = await workers.submit(PROMPT, SHORT)
        await gate.reached.wait()
        waiting = await workers.submit(tuple(range(20, 280)), SHORT)
        behind = await workers.submit(PROMPT[100:150], SHORT)
        await until(workers, waiting=3, free_pages=24 - 13)
        await cancelled(workers, waiting)
        gate.open.set()
        for name in (behind, holder):
            (answer,) = await workers.answer(name)
            assert answer.finish is FinishReason.LENGTH


async def test_the_caller_leaves_while_it_cancels(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router whose connection breaks then asks for nothing more; the request must end all the same."""
    async with pair(small_model, decode_settings={"span_tokens": 32}) as workers:
        gate = Gate(workers, monkeypatch)
        name = await workers.submit(PROMPT, SHORT)
        await gate.reached.wait()
        worker = workers.decode.services.worker  # type: ignore[attr-defined]
        cancelling = asyncio.create_task(worker.cancel(name, 0))
        await asyncio.sleep(0)
        cancelling.cancel()
        gate.open.set()
        (answer,) = await workers.answer(name)
        assert answer.finish is FinishReason.CANCELLED
        with pytest.raises(asyncio.CancelledError):
            await cancelling


async def test_mid_transfer(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(small_model, decode_settings={"span_tokens": 32}) as workers:
        gate = Gate(workers, monkeypatch)
        name = await workers.submit(PROMPT, SHORT)
        await gate.reached.wait()
        await cancelled(workers, name)
        gate.open.set()
        (answer,) = await workers.generate(PROMPT, SHORT)
        assert answer.usage is not None
        assert answer.usage.moved_tokens == len(PROMPT) - 1 - answer.usage.decode_cached_tokens


async def test_while_the_pair_connects(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connecting, go = asyncio.Event(), asyncio.Event()
    async with pair(small_model) as workers:
        client = workers.decode.services._pairs  # type: ignore[attr-defined]
        connect = client._connect

        async def held(target: Any, needed: bool) -> Any:
            connecting.set()
            await go.wait()
            return await connect(target, needed)

        monkeypatch.setattr(client, "_connect", held)
        name = await workers.submit(PROMPT, SHORT)
        await connecting.wait()
        await cancelled(workers, name)
        go.set()
        (answer,) = await workers.generate(PROMPT, SHORT)
        assert answer.usage is not None
        assert answer.usage.moved_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("choices", [1, 3])
async def test_decoding(choices: int, small_model: Path) -> None:
    async with pair(small_model) as workers:
        name = await workers.submit(PROMPT, LONG, choices=choices)
        await workers.tokens(name, 3)
        assert await workers.cancel(name)
        answers = await workers.answer(name)
        assert [answer.finish for answer in answers] == [FinishReason.CANCELLED] * choices
        for answer in answers:
            assert answer.usage is not None
            assert 3 <= len(answer.tokens) == answer.usage.completion_tokens < LONG.max_tokens


async def test_a_retracted_request(small_model: Path) -> None:
    async with pair(small_model, prefill=0, pages=24, max_context=384) as workers:
        names = [await workers.submit(PROMPT[at : at + 90], MIDDLING) for at in (0, 40, 80)]
        while not (await workers.decode.thread.call(workers.decode.engine.status)).retractions:
            await asyncio.sleep(0.001)
        for name in names:
            await workers.cancel(name)
        answers = [(await workers.answer(name))[0] for name in names]
        assert answers[-1].finish is FinishReason.CANCELLED


async def test_while_it_is_being_admitted(small_model: Path) -> None:
    """Submit waits for the engine, which is held; the cancel arrives first."""
    async with pair(small_model) as workers:
        release = hold_engine(workers)
        request = GenerateRequest(new_id(), "m", PROMPT, LONG)
        submitting = asyncio.create_task(workers.send(request))
        await known(workers, request.request_id)
        cancelling = asyncio.create_task(workers.cancel(request.request_id))
        (answer,) = await workers.answer(request.request_id)
        release()
        assert await cancelling
        assert answer.finish is FinishReason.CANCELLED
        with pytest.raises(grpc.aio.AioRpcError, match="ended while it was being admitted"):
            await submitting
        assert (await workers.decode.thread.call(workers.decode.engine.status)).prompt_tokens == 0


async def test_a_router_that_does_not_wait_for_the_admission(small_model: Path) -> None:
    async with pair(small_model) as workers:
        release = hold_engine(workers)
        request = GenerateRequest(new_id(), "m", PROMPT, LONG)
        submitting = asyncio.create_task(workers.send(request))
        await known(workers, request.request_id)
        submitting.cancel()
        (answer,) = await workers.answer(request.request_id)
        assert answer.finish is FinishReason.CANCELLED
        release()


async def test_an_unknown_request_and_an_old_attempt(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, LONG, attempt=2)
        await workers.send(request)
        old = decode_pb2.CancelRequest(request_id=request.request_id, attempt=1)
        assert not (await workers.stub.Cancel(old)).known
        assert not await workers.cancel(new_id())
        same = decode_pb2.CancelRequest(request_id=request.request_id, attempt=2)
        assert (await workers.stub.Cancel(same)).known


async def test_many_at_any_moment(small_model: Path) -> None:
    """Sixteen requests, each cancelled after another number of loop turns: whatever phase that hits, nothing leaks."""
    backend = InprocBackend()
    settings = {"pages": 40, "span_tokens": 16, "slab_mib": 0.0625}
    async with pair(small_model, backend=backend, max_batch_tokens=64, decode_settings=settings) as workers:

        async def one(index: int) -> FinishReason | None:
            name = await workers.submit(PROMPT[index:], SHORT, salt=str(index % 4))
            for _ in range(index * 4):
                await asyncio.sleep(0)
            await workers.cancel(name)
            return (await workers.answer(name))[0].finish

        for _ in range(3):
            ends = await asyncio.gather(*(one(index) for index in range(16)))
            assert set(ends) <= {FinishReason.CANCELLED, FinishReason.LENGTH}
            assert FinishReason.CANCELLED in ends
