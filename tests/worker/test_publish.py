"""Updates come to every watcher in one order without a gap; a watcher that lags is cut alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol, cast

import pytest

from router.cache.prefix_index import PrefixIndex
from tandem.cluster import CacheEvent, EventKind, Status, WorkerUpdate
from tandem.engine.output import EngineStatus
from tandem.kv import block_hashes
from tandem.testing.engine import make_seq
from tandem.worker import publish
from tandem.worker.publish import MAX_BACKLOG, Publisher

PROMPT = tuple(range(40)) * 4
HASHES = tuple(block_hashes(b"root", PROMPT))
PROMISE = CacheEvent(EventKind.PROMISED, (b"p" * 16,))


class Rigs(Protocol):
    def __call__(
        self, pages: int = 64, page_size: int = 16, start: bool = True
    ) -> AbstractAsyncContextManager[Any]: ...


Updates = AsyncGenerator[WorkerUpdate, None]


@asynccontextmanager
async def publishing(rig: Any, patch: pytest.MonkeyPatch) -> AsyncIterator[Publisher]:
    """A publisher that runs, without the pause between two publications."""
    patch.setattr(publish, "INTERVAL_S", 0.0)
    publisher = Publisher(
        "i" * 32, rig.engine, rig.thread, lambda: lambda now: Status("i" * 32, free_pages=now.free_pages)
    )
    running = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        running.cancel()
        await asyncio.wait([running])


def watch(publisher: Publisher) -> Updates:
    return cast(Updates, publisher.watch())


async def compute(rig: Any, name: str, prompt: tuple[int, ...] = PROMPT) -> None:
    """Runs a sequence to its end."""
    await rig.thread.call(rig.engine.add, make_seq(name, prompt, max_tokens=1))
    while not any(made.seq.seq_id == name and made.finish for step in rig.steps for made in step.outputs):
        await asyncio.sleep(0.001)


async def take(updates: Updates, kind: EventKind) -> tuple[list[int], list[CacheEvent]]:
    """Sequence numbers and events up to the first update with an event of a kind."""
    numbers, events = list[int](), list[CacheEvent]()
    async with asyncio.timeout(10):
        async for update in updates:
            numbers.append(update.sequence)
            events += update.events
            if any(event.kind is kind for event in update.events):
                return numbers, events
    raise AssertionError("the subscription ended")


def stored(events: list[CacheEvent]) -> list[bytes]:
    return [each for event in events if event.kind is EventKind.STORED for each in event.hashes]


async def test_a_snapshot_then_every_change_numbered_without_a_gap(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        updates = watch(publisher)
        first = await anext(updates)
        assert (first.sequence, first.snapshot, first.events) == (0, True, ())
        assert first.status == Status("i" * 32, free_pages=64)
        publisher.promises.make("p", PROMISE.hashes)
        await compute(rig, "a")
        publisher.poke()
        numbers, events = await take(updates, EventKind.STORED)
        assert numbers == list(range(1, len(numbers) + 1))
        assert events[0] == PROMISE
        assert stored(events) == list(HASHES)
        await updates.aclose()


async def test_who_comes_later_gets_the_whole_cache_and_the_same_future(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        early = watch(publisher)
        await anext(early)
        await compute(rig, "a")
        late = watch(publisher)
        snapshot = await anext(late)
        assert snapshot.snapshot
        assert stored(list(snapshot.events)) == list(HASHES)
        publisher.promises.make("p", PROMISE.hashes)
        _, events = await take(early, EventKind.PROMISED)
        assert stored(events) == list(HASHES), "what the snapshot showed one watcher, another one heard"
        numbers, events = await take(late, EventKind.PROMISED)
        assert numbers == list(range(1, len(numbers) + 1))
        assert stored(events) == []
        await early.aclose()
        await late.aclose()


async def test_evicted_blocks_are_told(rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig_maker(pages=12) as rig, publishing(rig, monkeypatch) as publisher:
        updates = watch(publisher)
        await anext(updates)
        await compute(rig, "a")
        publisher.poke()
        await take(updates, EventKind.STORED)
        await compute(rig, "b", tuple(reversed(PROMPT)))
        publisher.poke()
        _, events = await take(updates, EventKind.EVICTED)
        assert {each for event in events if event.kind is EventKind.EVICTED for each in event.hashes} == set(HASHES)
        await updates.aclose()


async def test_a_watcher_that_lags_ends_and_the_other_goes_on(rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        slow, quick = watch(publisher), watch(publisher)
        await anext(slow)
        await anext(quick)
        seen = 0
        for _ in range(MAX_BACKLOG + 1):
            publisher.promises.make("p", PROMISE.hashes)
            update = await anext(quick)
            seen += len(update.events)
        assert seen == MAX_BACKLOG + 1
        numbers = [update.sequence async for update in slow]
        assert numbers == list(range(1, MAX_BACKLOG + 1)), "it gets what it had, then the end: it subscribes anew"
        publisher.promises.make("p", PROMISE.hashes)
        assert (await anext(quick)).events == (PROMISE,)
        await quick.aclose()


async def test_a_status_comes_even_when_nothing_happens(rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "HEARTBEAT_S", 0.01)
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        updates = watch(publisher)
        for _ in range(4):
            assert (await anext(updates)).status == Status("i" * 32, free_pages=64)
        await updates.aclose()


async def test_a_watcher_that_left_is_forgotten(rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        updates = watch(publisher)
        await anext(updates)
        assert len(publisher._watchers) == 1
        await updates.aclose()
        assert publisher._watchers == {}


async def test_a_cancellation_that_comes_with_an_event_is_not_lost(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wait_for` of Python 3.11 swallows it, and the worker's stop would wait for ever."""
    async with rig_maker() as rig:
        publisher = Publisher("i" * 32, rig.engine, rig.thread, lambda: lambda _: Status("i" * 32))
        for _ in range(20):
            running = asyncio.create_task(publisher.run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            publisher.poke()
            await asyncio.sleep(0)
            running.cancel()
            done, _ = await asyncio.wait([running], timeout=5)
            assert done


async def test_a_status_names_no_dispatch_that_came_after_the_engine_was_asked(rig_maker: Rigs) -> None:
    """Its load would be missing from a status that claims to include it."""
    async with rig_maker() as rig:
        last = 0

        def compose() -> Callable[[EngineStatus], Status]:
            return partial(_status, last)

        def _status(dispatch: int, _: EngineStatus) -> Status:
            return Status("i" * 32, dispatches={"router": dispatch})

        step = threading.Event()
        rig.thread.post(step.wait)
        updates = cast(Updates, Publisher("i" * 32, rig.engine, rig.thread, compose).watch())
        first = asyncio.ensure_future(anext(updates))
        await asyncio.sleep(0)
        last = 7
        step.set()
        update = await first
        assert update.status is not None and update.status.dispatches == {"router": 0}
        await updates.aclose()


async def test_a_promise_is_taken_back_behind_the_report_of_what_was_stored(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_maker(pages=12) as rig, publishing(rig, monkeypatch) as publisher:
        updates = watch(publisher)
        await anext(updates)
        publisher.promises.make("a", HASHES)
        await compute(rig, "a")
        publisher.promises.end("a")
        publisher.poke()
        _, events = await take(updates, EventKind.WITHDRAWN)
        kinds = [event.kind for event in events]
        assert kinds.index(EventKind.STORED) < kinds.index(EventKind.WITHDRAWN)
        assert events[-1].hashes == HASHES
        await updates.aclose()


async def test_a_block_that_comes_and_goes_between_two_reports_does_not_stay_promised(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in neither report; an index that followed would otherwise keep it for hours."""
    monkeypatch.setattr(publish, "HEARTBEAT_S", 60.0)
    async with rig_maker(pages=12) as rig, publishing(rig, monkeypatch) as publisher:
        updates, index = watch(publisher), PrefixIndex(1000, 1e9, lambda: 0.0)
        await anext(updates)
        publisher.promises.make("a", HASHES)
        await compute(rig, "a")
        publisher.promises.end("a")
        await compute(rig, "b", tuple(reversed(PROMPT)))
        publisher.poke()
        _, events = await take(updates, EventKind.WITHDRAWN)
        assert HASHES[0] not in stored(events)
        for event in events:
            index.apply("i" * 32, event)
        assert index.match(HASHES) == {}
        await updates.aclose()


async def test_a_burst_of_promises_cuts_nobody_and_who_comes_later_hears_of_them(
    rig_maker: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the engine can answer more admissions in one turn of the loop than a watcher may lag updates."""
    async with rig_maker() as rig, publishing(rig, monkeypatch) as publisher:
        early = watch(publisher)
        await anext(early)
        made = tuple(
            CacheEvent(EventKind.PROMISED, (number.to_bytes(16, "little"),)) for number in range(MAX_BACKLOG + 50)
        )
        for number, event in enumerate(made):
            publisher.promises.make(str(number), event.hashes)
        _, events = await take(early, EventKind.PROMISED)
        assert tuple(events) == made
        publisher.promises.end("0")
        late = watch(publisher)
        assert (await anext(late)).events == made[1:]
        await early.aclose()
        await late.aclose()
