"""A prefill worker in this process: what it promises and stores, and that it never holds more than it must."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.cluster import CacheEvent, EventKind, WorkerUpdate
from tandem.config import PrefillConfig
from tandem.engine.build import build_engine
from tandem.engine.output import StepOutput
from tandem.errors import ContextTooLong, Unavailable
from tandem.kv import HashRoot, Span, block_hashes
from tandem.testing.pair import Pair, pair
from tandem.types import SamplingParams
from tandem.worker.engine_thread import EngineThread
from tandem.worker.kv_source import EngineKvSource

PROMPT = tuple(range(10, 210))
SHORT = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


def root_of(workers: Pair) -> bytes:
    info = workers.prefill[0].info
    return HashRoot("tandem", info.model.fingerprint, info.kv_dtype).digest()


async def events_until(updates: AsyncIterator[WorkerUpdate], kind: EventKind) -> list[CacheEvent]:
    """Everything up to the first event of a kind."""
    seen: list[CacheEvent] = []
    async for update in updates:
        seen += update.events
        if any(event.kind is kind for event in update.events):
            return seen
    raise AssertionError("the subscription ended")


async def test_blocks_are_promised_then_stored_then_the_promise_is_closed(small_model: Path) -> None:
    async with pair(small_model) as workers:
        updates = workers.prefill[0].publisher.watch()
        assert (await anext(updates)).snapshot
        name = await workers.submit(PROMPT, SHORT)
        events = await events_until(updates, EventKind.STORED)
        if all(event.kind is not EventKind.WITHDRAWN for event in events):
            events += await events_until(updates, EventKind.WITHDRAWN)
        await workers.answer(name)
        await updates.aclose()  # type: ignore[attr-defined]
        hashes = tuple(block_hashes(root_of(workers), PROMPT[:-1]))
        assert len(hashes) == 3
        assert events[0] == CacheEvent(EventKind.PROMISED, hashes)
        stored = [each for event in events if event.kind is EventKind.STORED for each in event.hashes]
        assert stored == list(hashes)


async def test_a_cancelled_prompt_s_promise_is_taken_back(small_model: Path) -> None:
    async with pair(small_model) as workers:
        updates = workers.prefill[0].publisher.watch()
        await anext(updates)
        release = asyncio.Event()
        source = workers.prefill[0].services._engine_source  # type: ignore[attr-defined]
        opened, started = source.open, asyncio.Event()

        async def slow(*arguments: Any) -> int:
            started.set()
            await release.wait()
            return int(await opened(*arguments))

        source.open = slow
        name = await workers.submit(PROMPT, SHORT)
        await started.wait()
        assert await workers.cancel(name)
        events = await events_until(updates, EventKind.WITHDRAWN)
        assert [event.kind for event in events] == [EventKind.PROMISED, EventKind.WITHDRAWN]
        assert events[0].hashes == events[1].hashes
        await updates.aclose()  # type: ignore[attr-defined]
        await workers.answer(name)


async def test_it_never_samples_and_keeps_no_sequence(small_model: Path) -> None:
    async with pair(small_model) as workers:
        worker = workers.prefill[0]
        seen: list[int] = []
        step = worker.services.on_step

        def watching(output: Any) -> None:
            seen.extend(len(made.tokens) for made in output.outputs)
            step(output)

        worker.services.on_step = watching  # type: ignore[method-assign]
        await asyncio.gather(*(workers.generate(PROMPT[at:], SHORT) for at in range(8)))
        await workers.check_leaks()
        assert seen == []
        assert worker.engine.seqs == {}
        assert worker.engine.status().cached_pages > 0


@asynccontextmanager
async def engine_source(
    model: Path, computes: bool, **settings: Any
) -> AsyncIterator[tuple[EngineKvSource, EngineThread]]:
    """A source on an engine of its own, stepping."""
    config = PrefillConfig(model=str(model), kv_mib=4, **settings)
    engine, loaded = build_engine(config)
    sources: list[EngineKvSource] = []
    thread = EngineThread(engine, lambda output: sources[0].on_step(output), raise_it)
    source = EngineKvSource(engine, thread, HashRoot("c", "m", "float32"), engine.capacity_tokens, computes=computes)
    sources.append(source)
    thread.start()
    try:
        yield source, thread
        assert source.leaks() == []
        assert await thread.call(engine.idle_leaks) == []
        await thread.call(engine.check_integrity)
    finally:
        await thread.stop()
    assert loaded.layout == engine._pool.layout


def raise_it(error: BaseException) -> None:
    raise error


async def reach(source: EngineKvSource, ticket: str, tokens: Sequence[int], until: int) -> tuple[int, list[int]]:
    """Opens a ticket and follows its progress; also what was cached."""
    progress: list[int] = []
    enough = asyncio.Event()

    def on_progress(computed: int) -> None:
        progress.append(computed)
        if computed >= until:
            enough.set()

    cached = await source.open(ticket, tokens, "", "", 0, on_progress)
    await enough.wait()
    return cached, progress


async def test_progress_rises_chunk_by_chunk_and_each_part_can_be_exported(small_model: Path) -> None:
    async with engine_source(small_model, True, max_batch_tokens=64) as (source, thread):
        assert await reach(source, "a", PROMPT, len(PROMPT)) == (0, [64, 128, 192, 200])
        layout = thread._engine._pool.layout
        whole = np.zeros(200 * layout.token_bytes, dtype=np.uint8)
        await source.export("a", Span(0, 200), whole)
        assert whole.any()
        await source.close("a")
        cached, progress = await reach(source, "b", (*PROMPT, 5), 201)
        assert cached == 192
        assert progress in ([192, 201], [201]), "a step may be faster than the answer"
        again = np.zeros(192 * layout.token_bytes, dtype=np.uint8)
        await source.export("b", Span(0, 192), again)
        planes = layout.num_layers * 2
        shape = (planes, -1, layout.token_bytes // planes)
        np.testing.assert_array_equal(again.reshape(shape), whole.reshape(shape)[:, :192])
        await source.close("b")


async def test_a_source_that_does_not_compute_gives_only_what_it_has(small_model: Path) -> None:
    async with engine_source(small_model, False) as (source, _):
        with pytest.raises(Unavailable, match="only 0 of 200 tokens are cached here"):
            await source.open("a", PROMPT, "", "", 0, lambda _: None)
        await source.close("a")


async def test_what_was_only_cached_is_not_computed_again_once_its_pages_were_needed(small_model: Path) -> None:
    async with engine_source(small_model, True) as (source, thread):
        await reach(source, "a", PROMPT, len(PROMPT))
        await source.close("a")
        assert await source.open("copy", PROMPT[:192], "", "", 0, lambda _: None, cached_only=True) == 192
        seqs = thread._engine.seqs
        source.on_step(StepOutput((), (), (seqs["copy"],), 0, 0.0, 0.0, 0.0))
        with pytest.raises(Unavailable, match="are given away"):
            await source.export("copy", Span(0, 192), np.zeros(0, dtype=np.uint8))
        assert await thread.call(lambda: "copy" in seqs) is False
        await source.close("copy")


async def test_an_export_that_waits_for_pages_ends_when_nobody_wants_it(small_model: Path) -> None:
    async with engine_source(small_model, True) as (source, thread):
        await reach(source, "a", PROMPT, len(PROMPT))
        seqs = thread._engine.seqs
        source.on_step(StepOutput((), (), (seqs["a"],), 0, 0.0, 0.0, 0.0))
        export = asyncio.create_task(source.export("a", Span(0, 200), np.zeros(0, dtype=np.uint8)))
        await asyncio.sleep(0)
        assert not export.done()
        for _ in range(2):
            source.give_up("a")
        with pytest.raises(Unavailable, match="are given away"):
            await export
        assert await thread.call(lambda: "a" in seqs) is False
        source.give_up("unknown")
        await source.close("a")


async def test_a_prompt_beyond_the_pages_is_refused(small_model: Path) -> None:
    async with engine_source(small_model, True, pages=4) as (source, _):
        with pytest.raises(ContextTooLong, match="has 200 tokens; this worker's pages hold 64"):
            await source.open("a", PROMPT, "", "", 0, lambda _: None)


async def test_an_export_of_a_closed_ticket_is_refused(small_model: Path) -> None:
    async with engine_source(small_model, True) as (source, _):
        await reach(source, "a", PROMPT, len(PROMPT))
        await source.close("a")
        await source.close("a")
        with pytest.raises(Unavailable, match="is closed"):
            await source.export("a", Span(0, 1), np.zeros(0, dtype=np.uint8))


async def test_an_open_that_is_cancelled_leaves_nothing(small_model: Path) -> None:
    async with engine_source(small_model, True) as (source, thread):
        go_on = threading.Event()
        thread.post(go_on.wait)
        opening = asyncio.create_task(source.open("a", PROMPT, "", "", 0, lambda _: None))
        while not source.leaks():
            await asyncio.sleep(0)
        opening.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([opening])
        assert opening.cancelled()
