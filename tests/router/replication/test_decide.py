"""When a prefix is worth a copy, and where: never for nothing, and never where it cannot be used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies import RequestInfo
from router.policies.cost import HAND_OVER_MS
from router.replication import decide as decide_module
from router.replication.decide import HORIZON_S, LEAST_REQUESTS, MARGIN, Replica, wanted
from router.replication.heat import TAU_S
from router.workers.snapshot import RECENT_S, FleetSnapshot, WorkerView, decayed
from tandem.cluster import Candidate, Role, Status, StepTiming
from tandem.kv import BLOCK_TOKENS
from tandem.testing.workers import fake_info

NOW = 100.0
BLOCKS = 20
TOKENS = BLOCKS * BLOCK_TOKENS
TIMING = StepTiming(base_ms=10.0, per_token_ms=0.2)
COUNTS = {BLOCKS: 40.0}
REQUEST = RequestInfo("r", TOKENS + 200, 64, ordinal=0)


def worker(name: str, role: Role = Role.PREFILL, recent: float = 0.0, pages: int = 4096, **status: Any) -> WorkerView:
    fields: dict[str, Any] = {"free_pages": pages, "total_pages": pages, "timing": TIMING, "move_bytes_per_ms": 1e6}
    info = fake_info(role, incarnation=name, total_pages=pages)
    return WorkerView(info, Status(name, **{**fields, **status}), recent_tokens=recent, recent_at=NOW)


DECODE = worker("d", Role.DECODE)
BUSY = worker("a", queued_tokens=4000)


def decide(
    prefill: list[WorkerView],
    matches: dict[str, int],
    decode: tuple[WorkerView, ...] = (DECODE,),
    chosen: str | None = "a",
    **changes: Any,
) -> Replica | None:
    fields: dict[str, Any] = {"counts": COUNTS, "broken": (), "now": NOW, **changes}
    return wanted(REQUEST, FleetSnapshot(tuple(prefill), decode), matches, Candidate("d", chosen, 0, 0, {}), **fields)


def test_a_popular_prefix_goes_from_a_worker_that_is_waited_for_to_one_that_is_not() -> None:
    found = decide([BUSY, worker("b", queued_tokens=900), worker("c")], {"a": TOKENS})
    assert found is not None
    assert (found.source, found.target, found.blocks, found.tokens) == ("a", "c", BLOCKS, TOKENS)
    assert found.bytes == BUSY.info.layout.token_bytes * TOKENS
    terms = found.terms
    assert terms["requests_per_s"] == 40.0 / TAU_S
    assert terms["wait"] == 16 * 10.0 + 4000 * 0.2
    assert terms["saved"] == 5 * 10.0 + TOKENS * 0.2, "no more than computing it again"
    assert terms["worth"] == terms["requests_per_s"] * HORIZON_S * terms["saved"]
    assert terms["move"] == HAND_OVER_MS + found.bytes / 1e6


def test_it_is_copied_before_anybody_waits_when_its_holder_has_little_time_left() -> None:
    """Nothing is queued, but the worker computed for 90 % of the last half minute."""
    busy = worker("a", recent=0.9 * RECENT_S * 1e3 / 0.2)
    found = decide([busy, worker("b")], {"a": TOKENS})
    assert found is not None
    assert found.target == "b"
    assert decide([worker("a", recent=1000.0), worker("b")], {"a": TOKENS}) is None


@pytest.mark.parametrize(
    ("views", "matches", "changes"),
    [
        ([BUSY, worker("b")], {"a": TOKENS}, {"counts": {BLOCKS: LEAST_REQUESTS - 0.1}}),
        ([worker("a"), worker("b")], {"a": TOKENS}, {}),
        ([BUSY, worker("b"), worker("c")], {"a": TOKENS, "b": TOKENS}, {}),
        ([BUSY, worker("b")], {"a": TOKENS - 1}, {}),
        ([BUSY, worker("b", queued_tokens=4000)], {"a": TOKENS}, {}),
        ([BUSY, replace(worker("b"), draining=True)], {"a": TOKENS}, {"decode": ()}),
        ([BUSY, worker("b")], {"a": TOKENS}, {"broken": [("a", "b")], "decode": ()}),
        ([BUSY, worker("b", pages=4 * TOKENS // 16 - 1)], {"a": TOKENS}, {"decode": ()}),
        ([BUSY, worker("b", move_bytes_per_ms=1.0)], {"a": TOKENS}, {}),
        ([BUSY, worker("b")], {"d": TOKENS}, {}),
    ],
    ids=["rare", "idle", "two have it", "not whole", "all busy", "draining", "broken", "no room", "slow", "no holder"],
)
def test_nothing_is_copied(views: list[WorkerView], matches: dict[str, int], changes: dict[str, Any]) -> None:
    if views[1].status.move_bytes_per_ms == 1.0:
        views = [replace(BUSY, status=replace(BUSY.status, move_bytes_per_ms=1.0)), views[1]]
    assert decide(views, matches, **changes) is None


def test_the_only_prefill_worker_s_prefix_goes_to_a_decode_worker() -> None:
    found = decide([BUSY], {"a": TOKENS})
    assert found is not None
    assert (found.source, found.target) == ("a", "d")


def test_decode_workers_that_prefill_alone_copy_among_themselves() -> None:
    first, second = worker("d", Role.DECODE, queued_tokens=4000), worker("e", Role.DECODE)
    found = decide([], {"d": TOKENS}, decode=(first, second), chosen=None)
    assert found is not None
    assert (found.source, found.target) == ("d", "e")


def test_it_comes_from_whoever_has_least_to_do() -> None:
    found = decide([BUSY, worker("b")], {"a": TOKENS, "d": TOKENS})
    assert found is not None
    assert (found.source, found.target) == ("d", "b")


def test_of_a_prompt_s_prefixes_the_one_that_is_worth_most_is_copied() -> None:
    found = decide([BUSY, worker("b")], {"a": TOKENS}, counts={2: 41.0, BLOCKS: 40.0, BLOCKS + 2: 40.0})
    assert found is not None
    assert found.blocks == BLOCKS


def test_a_shorter_prefix_that_many_more_ask_for_is_not_lost_among_longer_ones() -> None:
    counts = {8: 100.0, **dict.fromkeys(range(9, BLOCKS + 1), 4.0)}
    found = decide([BUSY, worker("b")], {"a": TOKENS}, counts=counts)
    assert found is not None
    assert found.blocks == 8


@pytest.mark.parametrize(("count", "looks"), [(40.0, 130), (LEAST_REQUESTS - 0.1, 0)])
def test_each_worker_is_looked_at_once_however_many_prefixes_are_popular(
    monkeypatch: pytest.MonkeyPatch, count: float, looks: int
) -> None:
    """It is decided for every request, on the event loop: 65 workers of either role."""
    looked = MagicMock(wraps=decayed)
    weighed = MagicMock(wraps=decide_module._copy)
    monkeypatch.setattr(decide_module, "decayed", looked)
    monkeypatch.setattr(decide_module, "_copy", weighed)
    prefill = [BUSY, *(worker(f"p{n}", queued_tokens=4000, pages=1 << 16) for n in range(64))]
    decode = tuple(worker(f"d{n}", Role.DECODE) for n in range(65))
    matches = {view.incarnation: TOKENS for view in (*prefill[:8], *decode)}
    decide(prefill, matches, decode, counts=dict.fromkeys(range(1, BLOCKS + 1), count))
    assert looked.call_count <= looks
    assert weighed.call_count <= decide_module.WEIGHED


def test_no_worker_is_looked_at_for_a_prefix_that_no_wait_would_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide_module, "decayed", lambda *of: pytest.fail("looked"))
    slow = replace(BUSY, status=replace(BUSY.status, move_bytes_per_ms=1.0))
    assert decide([slow, worker("b", move_bytes_per_ms=1.0)], {"a": TOKENS}) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 3 * TOKENS)), min_size=1, max_size=6),
    st.floats(0, 200),
)
def test_what_is_copied_is_always_worth_it_and_missing_there(workers: list[tuple[int, int]], count: float) -> None:
    views = [worker(f"p{n}", queued_tokens=queued) for n, (queued, _) in enumerate(workers)]
    matches = {f"p{n}": cached for n, (_, cached) in enumerate(workers)}
    found = decide(views, matches, chosen="p0", counts={4: count, BLOCKS: count / 2})
    if found is not None:
        assert matches[found.source] >= found.tokens > matches.get(found.target, 0)
        assert found.terms["worth"] > MARGIN * found.terms["move"]
        assert found.terms["wait"] > found.terms["wait_there"]
