"""The prefix index against a naive model, its bounds, its fences and its predictions."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.cache.predictions import PREDICTION_S
from router.cache.prefix_index import PrefixIndex
from tandem.cluster import CacheEvent, EventKind

WORKERS = ("a", "b", "c")
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chain(path: list[int]) -> tuple[bytes, ...]:
    """Chained block hashes of a path of symbols."""
    hashes, parent = [], b""
    for symbol in path:
        parent = hashlib.blake2b(parent + bytes([symbol]), digest_size=16).digest()
        hashes.append(parent)
    return tuple(hashes)


def event(kind: EventKind, hashes: tuple[bytes, ...], skip: int = 0) -> CacheEvent:
    return CacheEvent(kind, hashes[skip:], hashes[skip - 1] if skip else b"")


def make(max_blocks: int = 10_000, max_age_s: float = 1e9) -> tuple[PrefixIndex, Clock]:
    clock = Clock()
    return PrefixIndex(max_blocks, max_age_s, clock), clock


class IndexMachine(RuleBasedStateMachine):
    """Workers store, promise, evict, withdraw, restart and take snapshots; a dict of sets says what must match."""

    bounded = False

    @initialize(max_blocks=st.integers(4, 30), sweep=st.integers(1, 3))
    def start(self, max_blocks: int, sweep: int) -> None:
        self.index, self.clock = make(max_blocks if self.bounded else 10_000, 100.0 if self.bounded else 1e9)
        self.index.sweep_nodes = sweep
        self.stored: dict[str, set[bytes]] = {name: set() for name in WORKERS}
        self.promised: dict[str, set[bytes]] = {name: set() for name in WORKERS}
        self.predicted: dict[int, tuple[str, tuple[bytes, ...], float]] = {}

    def held(self, worker: str, hashes: tuple[bytes, ...]) -> int:
        have = self.stored[worker] | self.promised[worker]
        real = next((i for i, block in enumerate(hashes) if block not in have), len(hashes))
        shared = [
            next(
                (i for i, (x, y) in enumerate(zip(hashes, guess, strict=False)) if x != y), min(len(hashes), len(guess))
            )
            for name, guess, expires in self.predicted.values()
            if name == worker and expires > self.clock.now
        ]
        return max([real, *shared])

    def starting_point(self, worker: str, hashes: tuple[bytes, ...], whole: bool) -> int:
        """Real workers extend what they hold: events begin at the root or after a block of their own."""
        have = self.stored[worker] | self.promised[worker]
        known = next((i for i, block in enumerate(hashes) if block not in have), len(hashes))
        return 0 if whole else min(known, len(hashes) - 1)

    @rule(worker=st.sampled_from(WORKERS), path=PATHS, whole=st.booleans(), promise=st.booleans())
    def add(self, worker: str, path: list[int], whole: bool, promise: bool) -> None:
        hashes = chain(path)
        skip = self.starting_point(worker, hashes, whole)
        self.index.apply(worker, event(EventKind.PROMISED if promise else EventKind.STORED, hashes, skip))
        if promise:
            self.promised[worker] |= set(hashes[skip:]) - self.stored[worker]
        else:
            self.stored[worker] |= set(hashes[skip:])
            self.promised[worker] -= set(hashes[skip:])

    @rule(worker=st.sampled_from(WORKERS), path=PATHS, skip=st.integers(0, 8), backwards=st.booleans())
    def remove(self, worker: str, path: list[int], skip: int, backwards: bool) -> None:
        hashes = chain(path)[skip:]
        self.index.apply(worker, CacheEvent(EventKind.EVICTED, hashes[::-1] if backwards else hashes))
        self.stored[worker] -= set(hashes)
        self.promised[worker] -= set(hashes)

    @rule(worker=st.sampled_from(WORKERS), path=PATHS, skip=st.integers(0, 8))
    def withdraw(self, worker: str, path: list[int], skip: int) -> None:
        hashes = chain(path)[skip:]
        self.index.apply(worker, CacheEvent(EventKind.WITHDRAWN, hashes))
        self.promised[worker] -= set(hashes)

    @rule(worker=st.sampled_from(WORKERS))
    def drop(self, worker: str) -> None:
        self.index.drop(worker)
        self.stored[worker].clear()
        self.promised[worker].clear()
        self.predicted = {n: p for n, p in self.predicted.items() if p[0] != worker}

    @rule(worker=st.sampled_from(WORKERS), paths=st.lists(PATHS, max_size=3))
    def snapshot(self, worker: str, paths: list[list[int]]) -> None:
        self.index.snapshot(worker, [event(EventKind.STORED, chain(path)) for path in paths])
        self.stored[worker] = {block for path in paths for block in chain(path)}
        self.promised[worker].clear()

    @rule(worker=st.sampled_from(WORKERS), path=PATHS)
    def predict(self, worker: str, path: list[int]) -> None:
        number = self.index.predictions.add(worker, chain(path))
        self.predicted[number] = (worker, chain(path), self.clock.now + PREDICTION_S)

    @precondition(lambda self: self.predicted)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.predicted)))
        self.index.predictions.resolve(number)
        del self.predicted[number]

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(path=PATHS)
    def match(self, path: list[int]) -> None:
        hashes = chain(path)
        found = self.index.match(hashes)
        for worker in WORKERS:
            if self.bounded:
                assert found.get(worker, 0) <= self.held(worker, hashes)
            else:
                assert found.get(worker, 0) == self.held(worker, hashes)
        assert 0 not in found.values()
        assert found.keys() <= set(WORKERS)

    @invariant()
    def whole(self) -> None:
        self.index.check_integrity()


class BoundedMachine(IndexMachine):
    bounded = True


TestModel = IndexMachine.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestBounded = BoundedMachine.TestCase
TestBounded.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


def test_an_edge_is_one_node_until_holders_differ() -> None:
    index, _ = make()
    long = chain([0] * 50)
    index.apply("a", event(EventKind.STORED, long))
    assert (index.nodes, len(index)) == (1, 50)
    index.apply("b", event(EventKind.STORED, long[:20]))
    assert index.nodes == 2
    assert index.match(long) == {"a": 50, "b": 20}
    index.apply("b", event(EventKind.STORED, long, skip=20))
    assert index.nodes == 1


def test_growing_block_by_block_stays_one_edge() -> None:
    index, _ = make()
    blocks = chain([1] * 30)
    for skip in range(30):
        index.apply("a", CacheEvent(EventKind.STORED, (blocks[skip],), blocks[skip - 1] if skip else b""))
    assert index.nodes == 1
    index.check_integrity()


def test_a_promise_counts_and_is_closed_by_stored_or_withdrawn() -> None:
    index, _ = make()
    blocks = chain([0, 1, 0, 1])
    index.apply("a", event(EventKind.PROMISED, blocks))
    assert index.match(blocks) == {"a": 4}
    index.apply("a", event(EventKind.STORED, blocks[:2]))
    index.apply("a", CacheEvent(EventKind.WITHDRAWN, blocks))
    assert index.match(blocks) == {"a": 2}


def test_a_dropped_worker_vanishes_at_once_and_its_slot_is_not_reused_too_early() -> None:
    index, _ = make()
    # Many separate leaves, more than one sweep clears.
    paths = [chain([n // 250, n % 250]) for n in range(500)]
    for path in paths:
        index.apply("old", event(EventKind.STORED, path))
    index.drop("old")
    assert all(index.match(path) == {} for path in paths)
    index.apply("new", event(EventKind.STORED, chain([255])))
    assert all("new" not in index.match(path) for path in paths)
    for n in range(40):
        index.apply("new", event(EventKind.STORED, chain([255, n])))
    index.check_integrity()
    assert len(index) == 41
    index.apply("third", event(EventKind.STORED, chain([255, 1])))
    assert index.match(chain([255, 1])) == {"new": 2, "third": 2}


def test_blocks_after_an_unknown_block_are_counted_and_ignored() -> None:
    index, _ = make()
    blocks = chain([0, 0, 0])
    index.apply("a", CacheEvent(EventKind.STORED, blocks[2:], blocks[1]))
    assert (len(index), index.unplaced) == (0, 1)


def test_malformed_events_leave_the_tree_whole() -> None:
    index, _ = make()
    blocks = chain([0, 1, 0])
    index.apply("a", event(EventKind.STORED, blocks))
    index.apply("b", CacheEvent(EventKind.STORED, (b"x" * 16, blocks[1]), blocks[0]))
    index.apply("b", CacheEvent(EventKind.STORED, (b"y" * 16, b"y" * 16), blocks[0]))
    index.check_integrity()
    assert index.unplaced == 4
    assert index.match(blocks) == {"a": 3}


def test_other_tiers_are_not_counted() -> None:
    index, _ = make()
    index.apply("a", CacheEvent(EventKind.STORED, chain([0]), tier="disk"))
    assert index.match(chain([0])) == {}


def test_the_oldest_leaf_goes_first() -> None:
    index, clock = make(max_blocks=6)
    old, young = chain([0, 0, 0]), chain([1, 1, 1])
    index.apply("a", event(EventKind.STORED, old))
    clock.now = 1
    index.apply("a", event(EventKind.STORED, young))
    clock.now = 2
    assert index.match(old) == {"a": 3}  # a use makes it young again
    index.apply("a", event(EventKind.STORED, chain([0, 1])))
    assert index.match(young) == {"a": 2}
    assert index.match(old) == {"a": 3}


def test_unused_entries_age_out() -> None:
    index, clock = make(max_age_s=10)
    index.apply("a", event(EventKind.STORED, chain([0, 0])))
    clock.now = 9
    index.apply("a", event(EventKind.STORED, chain([1])))
    clock.now = 11
    assert index.match(chain([0, 0])) == {}
    assert index.match(chain([1])) == {"a": 1}


@pytest.mark.parametrize("resolved", [True, False])
def test_predictions_end_with_the_answer_or_with_time(resolved: bool) -> None:
    index, clock = make()
    number = index.predictions.add("a", chain([0, 1]))
    assert index.match(chain([0, 1, 0])) == {"a": 2}
    if resolved:
        index.predictions.resolve(number)
    else:
        clock.now = PREDICTION_S
    assert index.match(chain([0, 1, 0])) == {}
    assert len(index.predictions) == 0
    index.predictions.resolve(number)
