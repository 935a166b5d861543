"""Prompts are promised when they are taken, bounded, and what was not computed is taken back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefill_worker.source import PromisingSource
from tandem.cluster import CacheEvent, EventKind
from tandem.errors import Overloaded
from tandem.kv import HashRoot, Span, block_hashes
from tandem.testing.kv import FakeSource, small_layout
from tandem.types import TokenIds
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.promises import Promises

ROOT = HashRoot("cluster", "model", "float32")
TOKENS = tuple(range(150))


class Announcements:
    """The part of a publisher that a source uses."""

    def __init__(self) -> None:
        self.events: list[CacheEvent] = []
        self.poked = 0
        self.promises = Promises(self.events.extend)

    def report(self) -> None:
        """What follows the next report."""
        self.promises.seal()
        self.events += self.promises.taken_back()

    def poke(self) -> None:
        self.poked += 1


class Rig:
    """A source over a fake engine source."""

    def __init__(self, max_waiting: int = 2, caches: bool = True, **source: Any) -> None:
        self.inner = FakeSource(small_layout(), **source)
        self.publisher = Announcements()
        self.metrics = WorkerMetrics(tuple)
        inner: Any = self.inner
        parts: Any = SimpleNamespace(publisher=self.publisher, metrics=self.metrics, root=ROOT)
        self.source = PromisingSource(inner, parts, max_waiting, caches)

    async def open(self, ticket: str, tokens: TokenIds = TOKENS, salt: str = "", adapter: str = "") -> int:
        return await self.source.open(ticket, tokens, salt, adapter, 0, ignore)

    @property
    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.publisher.events]


def ignore(computed: int) -> None:
    """Nobody follows the progress."""


async def test_a_prompt_s_whole_blocks_are_promised_and_taken_back() -> None:
    rig = Rig(cached=64)
    assert await rig.open("a") == 64
    hashes = tuple(block_hashes(ROOT.digest(), TOKENS))
    assert len(hashes) == 2
    assert rig.publisher.events == [CacheEvent(EventKind.PROMISED, hashes)]
    assert rig.inner.closed == []
    await rig.source.close("a")
    rig.publisher.report()
    assert rig.publisher.events[1:] == [CacheEvent(EventKind.WITHDRAWN, hashes)]
    assert rig.inner.closed == ["a"]
    assert rig.publisher.poked


async def test_tenants_and_adapters_have_other_blocks() -> None:
    rig = Rig(max_waiting=3)
    for number, (salt, adapter) in enumerate([("", ""), ("tenant", ""), ("", "adapter")]):
        await rig.open(str(number), salt=salt, adapter=adapter)
    assert len({event.hashes for event in rig.publisher.events}) == 3


async def test_the_bound_counts_open_tickets() -> None:
    rig = Rig(max_waiting=2)
    await rig.open("a")
    await rig.open("b")
    with pytest.raises(Overloaded, match="2 prompts wait here; at most 2 are taken"):
        await rig.open("c")
    await rig.source.close("c")
    assert rig.kinds == [EventKind.PROMISED] * 2, "a prompt that was not taken promises nothing"
    await rig.source.close("a")
    await rig.open("c")


async def test_a_promise_that_the_engine_refuses_is_taken_back() -> None:
    rig = Rig(refuse="no")
    with pytest.raises(Overloaded):
        await rig.open("a")
    await rig.source.close("a")
    rig.publisher.report()
    assert rig.kinds == [EventKind.PROMISED, EventKind.WITHDRAWN]


async def test_without_a_cache_nothing_is_promised() -> None:
    rig = Rig(caches=False)
    await rig.open("a")
    await rig.source.close("a")
    rig.publisher.report()
    assert rig.publisher.events == []


async def test_a_prompt_without_a_whole_block_promises_nothing() -> None:
    rig = Rig()
    await rig.open("a", TOKENS[:63])
    await rig.source.close("a")
    rig.publisher.report()
    assert rig.publisher.events == []
    assert rig.inner.closed == ["a"]


async def test_exports_are_the_engine_s_and_hits_are_counted() -> None:
    rig = Rig(cached=100)
    await rig.open("a")

    span = Span(0, 10)
    out = np.zeros(10 * rig.inner.layout.token_bytes, dtype=np.uint8)
    await rig.source.export("a", span, out)
    assert rig.inner.exported == [("a", span)]
    assert value(rig.metrics.prompt_tokens) == 150
    assert value(rig.metrics.prefix_hits.labels("prefill")) == 100


def value(counter: Any) -> float:
    return float(counter._value.get())
