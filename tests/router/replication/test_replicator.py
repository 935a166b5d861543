"""Copies are bounded, ended when they must be, told of, and not tried again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from router.explain.recorder import Recorder
from router.explain.story import explanation
from router.metrics import _Called
from router.open_request import Chain, OpenRequest
from router.policies import RequestInfo
from router.replication.decide import LEAST_REQUESTS
from router.replication.dispatch import Copied
from router.replication.replicator import AGAIN_S, FAILED_S, Bounds, Replicator
from router.workers.pairs import PairHealth
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Candidate, Role, Status, StepTiming, new_id
from tandem.errors import Unavailable
from tandem.kv import BLOCK_TOKENS, block_hashes
from tandem.testing.workers import fake_info
from tandem.types import GenerateRequest, SamplingParams

BLOCKS = 16
TOKENS = BLOCKS * BLOCK_TOKENS
TIMING = StepTiming(base_ms=10.0, per_token_ms=0.2)


def view(name: str, queued: int = 0) -> WorkerView:
    info = fake_info(Role.DECODE, incarnation=name, total_pages=4096)
    status = Status(name, queued_tokens=queued, free_pages=4096, timing=TIMING, move_bytes_per_ms=1e6)
    return WorkerView(info, status)


class Rig:
    """A replicator whose copies wait for `gate`, or fail with `error`."""

    def __init__(self, at_once: int = 2, bytes_per_s: float = 1e9) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, str, int, str]] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.gone: set[str] = set()
        self.fleet = FleetSnapshot(decode=(view("a", 8000), view("b")))
        self.recorder = Recorder(100, 1 << 20, 1e6, self._clock)
        members: Any = SimpleNamespace(worker=self._worker)
        bounds = Bounds(at_once, bytes_per_s)
        pairs = PairHealth(self._clock)
        self.replicator = Replicator(bounds, members, pairs, self.recorder, self._copy, self._clock)

    def _clock(self) -> float:
        return self.now

    def _worker(self, name: str) -> Any:
        return None if name in self.gone else SimpleNamespace(incarnation=name, info=fake_info(Role.DECODE))

    async def _copy(self, target: Any, source: Any, tokens: tuple[int, ...], salt: str, adapter: str) -> Copied:
        self.asked.append((source.incarnation, target.incarnation, len(tokens), salt))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Copied(len(tokens), 1000, 0.25)

    def ask(self, first: int = 1, times: int = int(LEAST_REQUESTS), salt: str = "") -> OpenRequest:
        """Requests that begin alike, one after the other; the last one's record."""
        for _ in range(times):
            prompt = (first, *range(2, TOKENS + 100))
            request = GenerateRequest(new_id(), "m", prompt, SamplingParams(), salt=salt)
            chain = Chain(b"root", tuple(block_hashes(b"root" + salt.encode(), prompt)))
            record = OpenRequest(request, 8, chain, self.recorder.begin(request), self._clock)
            info = RequestInfo(request.request_id, len(prompt), 64, ordinal=0)
            self.replicator.placed(record, info, self.fleet, {"a": TOKENS}, Candidate("a", None, 0, 0, {}))
        return record

    async def settle(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)

    def page(self) -> str:
        registry = CollectorRegistry()
        registry.register(_Called(self.replicator.collect))
        return generate_latest(registry).decode()


async def test_a_copy_is_made_once_and_told_of() -> None:
    rig = Rig()
    record = rig.ask(salt="tenant")
    await rig.settle(lambda: bool(rig.asked))
    assert rig.asked == [("a", "b", TOKENS, "tenant")]
    rig.ask(salt="tenant")
    assert rig.replicator.running == 1
    assert "tandem_replicas_running 1.0" in rig.page()
    rig.gate.set()
    await rig.settle(lambda: not rig.replicator.running)
    rig.ask(salt="tenant")
    assert rig.replicator.running == 0, "its events are on the way"
    rig.now += AGAIN_S + 0.1
    rig.ask(salt="tenant")
    assert rig.replicator.running == 1
    (copy,) = explanation(record.story, None)["copies"]
    assert (copy["source"], copy["target"], copy["tokens"]) == ({"id": "a"}, {"id": "b"}, TOKENS)
    assert (copy["state"], copy["moved_tokens"], copy["bytes"], copy["ms"]) == ("done", TOKENS, 1000, 250.0)
    assert copy["terms"]["worth"] > 0
    assert 'tandem_replicas_total{outcome="done"} 1.0' in rig.page()
    assert "tandem_replica_bytes_total 1000.0" in rig.page()
    rig.recorder.check_integrity()
    await rig.replicator.close()


async def test_few_go_at_once_and_no_more_bytes_than_allowed() -> None:
    rig = Rig(at_once=2)
    for first in range(1, 4):
        rig.ask(first)
    await rig.settle(lambda: len(rig.asked) == 2)
    assert rig.replicator.running == 2
    rig.gate.set()
    await rig.settle(lambda: not rig.replicator.running)
    rig.ask(3)
    assert rig.replicator.running == 1, "the third had to wait"
    await rig.replicator.close()

    size = rig.fleet.decode[0].info.layout.token_bytes * TOKENS
    slow = Rig(at_once=9, bytes_per_s=size / 4)
    slow.gate.set()
    slow.ask(1)
    slow.ask(2)
    await slow.settle(lambda: not slow.replicator.running)
    assert len(slow.asked) == 1, "the first overdrew the allowance"
    slow.now += 2.9
    slow.ask(2)
    assert slow.replicator.running == 0
    slow.now += 0.2
    slow.ask(2)
    assert slow.replicator.running == 1
    await slow.replicator.close()


async def test_a_failure_is_told_and_not_repeated_at_once() -> None:
    rig = Rig()
    rig.error = Unavailable("only 0 of 1024 tokens are cached here")
    rig.gate.set()
    record = rig.ask()
    await rig.settle(lambda: not rig.replicator.running)
    (copy,) = explanation(record.story, None)["copies"]
    assert (copy["state"], copy["error"]) == ("failed", "only 0 of 1024 tokens are cached here")
    rig.now += FAILED_S - 0.1
    rig.ask()
    assert rig.replicator.running == 0
    rig.now += 0.2
    rig.ask()
    assert rig.replicator.running == 1
    await rig.replicator.close()
    assert rig.replicator.outcomes == {"failed": 1, "cancelled": 1}


@pytest.mark.parametrize("end", ["a", "b", "close"])
async def test_a_copy_ends_with_either_worker_and_with_the_router(end: str) -> None:
    rig = Rig()
    record = rig.ask()
    await rig.settle(lambda: bool(rig.asked))
    rig.replicator.worker_gone("elsewhere")
    assert rig.replicator.running == 1
    if end == "close":
        await rig.replicator.close()
    else:
        rig.replicator.worker_gone(end)
    await rig.settle(lambda: not rig.replicator.running)
    assert explanation(record.story, None)["copies"][0]["state"] == "cancelled"
    assert rig.replicator.outcomes == {"cancelled": 1}


async def test_none_are_made_when_none_are_allowed_or_an_end_is_gone() -> None:
    off = Rig(at_once=0)
    off.ask()
    assert off.replicator.running == len(off.replicator.heat) == 0
    rig = Rig()
    rig.gone = {"b"}
    rig.ask()
    assert rig.replicator.running == 0
