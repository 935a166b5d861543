"""A prefix that one worker has computed comes to another: over real gRPC, into its cache, as if computed there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.cluster import EventKind
from tandem.kv import HashRoot, block_hashes
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.pair import Pair, pair
from tandem.types import SamplingParams
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc
from tandem.worker.process import WorkerProcess

PROMPT = tuple(range(10, 210))
PREFIX = PROMPT[:192]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=2, vocab=400, max_positions=512, seed=5)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


async def replicate(receiver: WorkerProcess, source: WorkerProcess, **fields: Any) -> pb.ReplicateReply:
    asked = {
        "incarnation": receiver.info.incarnation,
        "source": source.info.incarnation,
        "source_address": source.info.address,
        "tokens": PREFIX,
        **fields,
    }
    async with grpc.aio.insecure_channel(receiver.info.address) as channel:
        return await rpc.ReplicationStub(channel).Replicate(pb.ReplicateRequest(**asked), timeout=20)


def computed(worker: WorkerProcess) -> int:
    """Tokens that the worker's engine has computed so far."""
    return int(worker.metrics.registry.get_sample_value("tandem_worker_step_tokens_total") or 0)


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_a_prefill_worker_serves_a_prefix_that_it_never_computed(model: Path) -> None:
    async with pair(model, prefill=2) as workers:
        first, second = workers.prefill
        workers.prefill = [first]
        (expected,) = await workers.generate(PROMPT, SAMPLING)
        updates = second.publisher.watch()
        assert (await anext(updates)).snapshot
        reply = await replicate(second, first)
        assert (reply.cached_tokens, reply.moved_tokens) == (192, 192)
        assert reply.bytes == first.info.layout.token_bytes * 192
        assert await second.leaks() == []
        events = [event async for update in _until_stored(updates) for event in update.events]
        root = HashRoot("tandem", second.info.model.fingerprint, second.info.kv_dtype).digest()
        assert [block for event in events for block in event.hashes] == list(block_hashes(root, PREFIX))
        await updates.aclose()  # type: ignore[attr-defined]
        before = computed(second)
        assert before == 0
        # The decode worker has the prompt, too: another one behind the same prefix needs the sender's KV no less.
        workers.prefill = [second]
        other = (*PREFIX, *range(300, 340))
        await workers.decode.thread.call(_forget, workers.decode)
        (answer,) = await workers.generate(other, SAMPLING)
        assert answer.usage is not None
        assert (answer.usage.sender, answer.usage.cached_tokens) == (second.info.incarnation, 192)
        assert computed(second) == len(other) - 1 - 192, "only what follows the prefix was computed"
        await workers.decode.thread.call(_forget, workers.decode)
        (again,) = await workers.generate(PROMPT, SAMPLING)
        assert again.tokens == expected.tokens
        workers.prefill = [first, second]


def _forget(worker: WorkerProcess) -> None:
    for group in range(len(worker.engine.memory.groups)):
        worker.engine.memory.cache.evict(group, worker.engine.memory.cache.evictable(group))


async def _until_stored(updates: Any) -> Any:
    async for update in updates:
        yield update
        if any(event.kind is EventKind.STORED for event in update.events):
            return


async def test_a_decode_worker_takes_a_prefix_and_prefills_the_rest_alone(model: Path) -> None:
    async with pair(model, decode_settings={"local_prefill_tokens": 4096}) as workers:
        sender, decode = workers.prefill[0], workers.decode
        await _compute_at(workers, sender, PREFIX)
        reply = await replicate(decode, sender)
        assert (reply.cached_tokens, reply.moved_tokens) == (192, 192)
        (answer,) = await workers.generate(PROMPT, SAMPLING, hand_over=False)
        assert answer.usage is not None
        assert (answer.usage.decode_cached_tokens, answer.usage.sender) == (192, "")
        await decode.thread.call(_forget, decode)
        (alone,) = await workers.generate(PROMPT, SAMPLING, hand_over=False)
        assert alone.usage is not None
        assert alone.usage.decode_cached_tokens == 0
        assert answer.tokens == alone.tokens


async def test_what_a_decode_worker_has_goes_to_a_prefill_worker(model: Path) -> None:
    async with pair(model) as workers:
        await workers.generate(PROMPT, SAMPLING, hand_over=False)
        reply = await replicate(workers.prefill[0], workers.decode)
        assert (reply.cached_tokens, reply.moved_tokens) == (192, 192)
        assert computed(workers.prefill[0]) == 0


async def _compute_at(workers: Pair, sender: WorkerProcess, tokens: tuple[int, ...]) -> None:
    """Lets a prefill worker compute a prefix for nobody."""
    source, done = sender.services._engine_source, asyncio.Event()  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()

    def progress(computed: int) -> None:
        if computed == len(tokens):
            loop.call_soon_threadsafe(done.set)

    await source.open("f" * 32, tokens, "", "", 0, progress)
    await done.wait()
    await source.close("f" * 32)


async def test_a_prefix_that_is_there_does_not_move_and_one_that_is_nowhere_is_not_computed(model: Path) -> None:
    async with pair(model, prefill=2) as workers:
        first, second = workers.prefill
        code, text = await refused(replicate(second, first))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "only 0 of 192 tokens are cached" in text
        assert computed(first) == 0, "the source computes nothing for a copy"
        await _compute_at(workers, first, PREFIX)
        assert (await replicate(second, first)).moved_tokens == 192
        assert (await replicate(second, first)).moved_tokens == 0
        assert (await replicate(second, first, tokens=PREFIX[:64])).cached_tokens == 64
        longer = (*PREFIX, *range(300, 364))
        await _compute_at(workers, first, longer)
        assert (await replicate(second, first, tokens=longer)).moved_tokens == 64, "only what it lacks moves"
        assert (await refused(replicate(second, first, incarnation="0" * 32)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert (await refused(replicate(second, second)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        second.services.drain()
        assert "draining" in (await refused(replicate(second, first, tokens=longer[:200])))[1]


async def test_other_salts_have_other_prefixes(model: Path) -> None:
    async with pair(model, prefill=2) as workers:
        first, second = workers.prefill
        await _compute_at(workers, first, PREFIX)
        assert "only 0 of 192" in (await refused(replicate(second, first, salt="other")))[1]


async def test_a_copy_takes_no_pages_that_requests_hold(model: Path) -> None:
    async with pair(model, prefill=2, kv_mib=0.5) as workers:
        first, second = workers.prefill
        pages = second.info.total_pages
        await _compute_at(workers, first, PREFIX)
        held = tuple(range(20, 20 + (pages - 4) * second.info.page_size))
        source = second.services._engine_source  # type: ignore[attr-defined]
        await source.open("e" * 32, held, "", "", 0, lambda _: None)
        await _settled(second, lambda: second.engine.memory.free_pages <= 4)
        assert "no pages" in (await refused(replicate(second, first)))[1]
        expected = [f"ticket {'e' * 32} still holds pages", *await _sequences(second)]
        async with asyncio.timeout(20):  # the sender's `quiesced` comes behind the refusal
            while await second.leaks() != expected:
                await asyncio.sleep(0.01)
        await source.close("e" * 32)


async def _sequences(worker: WorkerProcess) -> list[str]:
    return list(await worker.thread.call(worker.engine.idle_leaks))


async def _settled(worker: WorkerProcess, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not await worker.thread.call(condition):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["cancel", "sender"])
async def test_a_copy_that_is_ended_half_way_leaves_nothing_behind(model: Path, end: str) -> None:
    async with pair(model, prefill=2, span_tokens=64) as workers:
        first, second = workers.prefill
        await _compute_at(workers, first, PREFIX)
        source = first.services._engine_source  # type: ignore[attr-defined]
        export, reached, gate = source.export, asyncio.Event(), asyncio.Event()

        async def slow(ticket_id: str, span: Any, out: Any) -> None:
            if span.start:
                reached.set()
                await gate.wait()
            await export(ticket_id, span, out)

        source.export = slow
        copying = asyncio.create_task(replicate(second, first))
        await reached.wait()
        assert any("on its way" in leak for leak in await second.leaks())
        if end == "cancel":
            copying.cancel()
            gate.set()
            await asyncio.wait([copying])
        else:
            stopping = asyncio.create_task(workers.stop(first))
            with pytest.raises(grpc.aio.AioRpcError):
                await copying
            gate.set()
            await stopping
        await _settled(second, lambda: not second.services.leaks())
        await second.thread.call(second.engine.check_integrity)
