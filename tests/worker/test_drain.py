"""The orderly end of a worker: it says so, finishes what it has, and goes; within a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.errors import Fenced
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.pair import Pair, pair
from tandem.types import FinishReason, SamplingParams
from tandem.wire import codec, probe
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc
from tandem.worker.process import WorkerProcess

PROMPT = tuple(range(10, 210))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=32_768)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


def tokens(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@asynccontextmanager
async def draining(workers: Pair, worker: WorkerProcess) -> AsyncIterator[asyncio.Task[None]]:
    """A worker that was told to end; it is stopped at the end, as `serve` does."""
    worker.end()
    task = asyncio.create_task(worker.drain())
    try:
        yield task
    finally:
        worker.end()
        await task
        await workers.stop(worker)


async def says_draining(worker: WorkerProcess) -> bool:
    """What the next router hears first."""
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest(router_id="another"))
        async for message in call:
            status = codec.worker_update_from_wire(message).status
            if status is not None and status.draining:
                return True
        return False


async def test_what_is_under_way_is_finished_and_nothing_more_is_taken(model: Path) -> None:
    async with pair(model, kv_mib=32) as workers:
        (before,) = await workers.generate(PROMPT, tokens(900))
        name = await workers.submit(PROMPT, tokens(900))
        await workers.tokens(name, 1)
        async with draining(workers, workers.decode) as drained:
            async with asyncio.timeout(10):
                assert await says_draining(workers.decode)
            with pytest.raises(grpc.aio.AioRpcError, match="this worker is draining"):
                await workers.submit(PROMPT, tokens(4))
            (answer,) = await workers.answer(name)
            assert (answer.tokens, answer.finish) == (before.tokens, FinishReason.LENGTH)
            async with asyncio.timeout(10):
                await drained
            assert not workers.decode.stopping.is_set(), "it ended because nothing was left, not because it was told"


async def test_an_idle_worker_is_drained_at_once(model: Path) -> None:
    async with pair(model, kv_mib=32) as workers:
        await workers.generate(PROMPT, tokens(4))
        async with draining(workers, workers.decode) as drained, asyncio.timeout(10):
            await drained


async def test_a_drain_is_bounded_and_the_rest_ends_with_an_error(model: Path) -> None:
    async with pair(model, kv_mib=32, drain_s=0.2) as workers:
        name = await workers.submit(PROMPT, tokens(20_000))
        await workers.tokens(name, 1)
        async with draining(workers, workers.decode) as drained, asyncio.timeout(10):
            await drained
        (answer,) = await workers.answer(name)
        assert (answer.finish, answer.error) == (FinishReason.ERROR, "the worker is shutting down")
        assert answer.leaving, "another worker can go on"


async def test_a_second_signal_ends_the_wait(model: Path) -> None:
    async with pair(model, kv_mib=32, drain_s=3600) as workers:
        name = await workers.submit(PROMPT, tokens(20_000))
        await workers.tokens(name, 1)
        async with draining(workers, workers.decode) as drained:
            assert not drained.done()
            workers.decode.end()
            async with asyncio.timeout(10):
                await drained
        (answer,) = await workers.answer(name)
        assert (answer.finish, answer.leaving) == (FinishReason.ERROR, True)


async def test_a_prefill_worker_sends_what_was_asked_of_it(model: Path) -> None:
    async with pair(model, kv_mib=32, max_batch_tokens=16) as workers:
        sender = workers.prefill[0]
        long = tuple(index % 290 for index in range(4000))
        name = await workers.submit(long, tokens(4))
        while not sender.services.busy():
            await asyncio.sleep(0.001)
        async with draining(workers, sender) as drained:
            async with asyncio.timeout(10):
                assert await says_draining(sender)
            (answer,) = await workers.answer(name)
            assert answer.usage is not None
            assert answer.usage.moved_tokens == len(long) - 1
            async with asyncio.timeout(10):
                await drained


async def test_a_worker_whose_engine_failed_leaves_without_a_word(model: Path) -> None:
    """An orderly end would look as if the request had nothing to do with it; and another worker can go on."""
    async with pair(model, kv_mib=32) as workers:
        worker = workers.decode
        name = await workers.submit(PROMPT, tokens(20_000))
        await workers.tokens(name, 1)

        def fail(batch: Any, after: Any = None) -> Any:
            raise MemoryError("no room")

        worker.engine._runner.launch = fail  # type: ignore[method-assign]
        await worker.stopping.wait()
        await workers.stop(worker)
        with pytest.raises(grpc.aio.AioRpcError):
            await workers.answer(name)


async def test_who_is_told_over_the_network_ends_as_after_a_signal(model: Path) -> None:
    async with pair(model, kv_mib=32) as workers:
        worker = workers.decode
        name = await workers.submit(PROMPT, tokens(400))
        await workers.tokens(name, 1)
        serving = asyncio.create_task(end_of(worker))
        with pytest.raises(Fenced, match=f"^other is not here; this is {worker.info.incarnation}$"):
            await probe.drain(replace(worker.info, incarnation="other"))
        assert not worker.told.is_set()
        for _ in range(2):  # asked again, it still drains
            assert await probe.drain(worker.info) == worker.config.drain_s
        (answer,) = await workers.answer(name)
        assert answer.finish is FinishReason.LENGTH
        async with asyncio.timeout(10):
            await serving
        await workers.stop(worker)


async def end_of(worker: WorkerProcess) -> None:
    """What `serve` does once the worker stands."""
    await worker.told.wait()
    await worker.drain()
    assert not worker.stopping.is_set()
