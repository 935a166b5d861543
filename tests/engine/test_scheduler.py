from __future__ import annotations

from typing import Any

import pytest

from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Batch, Seq, SeqState
from tandem.kv import Span
from tandem.testing.engine import LAYOUT, FakeFlight, FakePool, FakeRunner, make_seq, naive_continuation


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine on fakes, with a clock in hand."""

    def __init__(self, pages: int = 64, page_size: int = 4, **limits: float) -> None:
        self.pool = FakePool(pages, page_size)
        self.runner = FakeRunner(self.pool)
        self.clock = Clock()
        self.engine = Engine(self.runner, self.pool, EngineConfig(**limits), self.clock)  # type: ignore[arg-type]

    def add(self, name: str, prompt: list[int], max_tokens: int = 4, **fields: Any) -> Seq:
        seq = make_seq(name, prompt, max_tokens, **fields)
        self.engine.add(seq)
        return seq

    def step(self) -> list[tuple[str, int, int]]:
        """One step; its rows."""
        before = len(self.runner.batches)
        self.engine.step()
        self.engine.check_integrity()
        return list(self.runner.batches[-1]) if len(self.runner.batches) > before else []

    def states(self, *seqs: Seq) -> list[SeqState]:
        return [seq.state for seq in seqs]

    def drain(self, *seqs: Seq, steps: int = 500) -> None:
        """Steps until all is done; then checks outputs and leaks."""
        for _ in range(steps):
            if not self.engine.has_work():
                break
            assert self.engine.step().advanced
            self.engine.check_integrity()
        assert self.engine.idle_leaks() == []
        for seq in seqs:
            assert seq.tokens[seq.prompt_len :] == naive_continuation(seq.tokens[: seq.prompt_len], seq.sampling)


def warm(bench: Bench, prompt: list[int]) -> None:
    bench.add("warm", prompt, max_tokens=1)
    bench.drain()


def test_decoding_comes_first_then_chunks_within_the_budget() -> None:
    bench = Bench(max_batch_tokens=8, max_running=8)
    first = bench.add("a", [1, 2, 3])
    assert bench.step() == [("a", 0, 3)]
    second = bench.add("b", list(range(20, 32)))
    assert bench.step() == [("a", 3, 1), ("b", 0, 7)]
    assert bench.step() == [("a", 4, 1), ("b", 7, 5)]
    assert bench.step() == [("a", 5, 1), ("b", 12, 1)]
    bench.drain(first, second)


def test_a_chunk_of_one_token_is_among_the_first_rows() -> None:
    bench = Bench(max_batch_tokens=4, max_running=8)
    seqs = [bench.add("a", [1, 2, 3, 4, 5]), bench.add("b", [6, 7, 8])]
    assert bench.step() == [("a", 0, 4)]
    assert bench.step() == [("a", 4, 1), ("b", 0, 3)]
    bench.drain(*seqs)


def test_chunks_shrink_to_keep_the_time_between_tokens() -> None:
    bench = Bench(pages=400, max_batch_tokens=200, max_running=8, inter_token_ms=60.0)
    launch = bench.runner.launch

    def timed(batch: Batch, after: FakeFlight | None = None) -> FakeFlight:
        bench.clock.now += 0.010 + 0.001 * batch.num_tokens
        return launch(batch, after)

    bench.runner.launch = timed  # type: ignore[method-assign]
    talker = bench.add("talker", [1, 2, 3], max_tokens=60)
    for length in range(10, 30):
        bench.add(f"p{length}", list(range(100, 100 + length)), max_tokens=1)
        bench.step()
    reader = bench.add("reader", [7] * 300, max_tokens=1)
    assert [(name, count) for name, _, count in bench.step()] == [("talker", 1), ("reader", 49)]
    bench.engine.cancel("talker")
    assert bench.step() == [("reader", 49, 200)], "without anyone who waits for a token, as much as fits"
    assert talker.finish is not None
    bench.drain(reader)


def test_no_more_than_max_running() -> None:
    bench = Bench(max_batch_tokens=64, max_running=2)
    seqs = [bench.add(name, [index, 1, 2]) for index, name in enumerate("abc")]
    assert {row[0] for row in bench.step()} == {"a", "b"}
    bench.drain(*seqs)
    assert max(len(rows) for rows in bench.runner.batches) == 2


def test_the_warm_prompt_overtakes_the_cold_one() -> None:
    bench = Bench(max_running=1)
    warm(bench, [1, 2, 3, 4, 5, 6, 7, 8])
    bench.add("cold", [9] * 8)
    bench.add("warm2", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert bench.step() == [("warm2", 8, 1)]


def test_nobody_waits_longer_than_the_ageing_behind_younger_ones() -> None:
    bench = Bench(max_running=1, ageing_s=2.0)
    warm(bench, [1, 2, 3, 4, 5, 6, 7, 8])
    cold = bench.add("cold", [9] * 8)
    began = bench.clock.now
    for index in range(50):
        bench.add(f"warm{index}", [1, 2, 3, 4, 5, 6, 7, 8, index], max_tokens=2)
        bench.step()
        if cold.state is SeqState.RUNNING:
            break
        bench.clock.now += 0.5
    assert cold.state is SeqState.RUNNING
    # It began at the first free place after its bound: each of the others holds the place for two steps.
    assert 2.0 <= bench.clock.now - began <= 2.0 + 2 * 0.5


def test_without_ageing_the_cold_one_would_still_wait() -> None:
    bench = Bench(max_running=1, ageing_s=1000.0)
    warm(bench, [1, 2, 3, 4, 5, 6, 7, 8])
    cold = bench.add("cold", [9] * 8)
    for index in range(20):
        bench.add(f"warm{index}", [1, 2, 3, 4, 5, 6, 7, 8, index], max_tokens=2)
        bench.step()
        bench.clock.now += 0.5
    assert cold.state is SeqState.WAITING


def test_priority_goes_first() -> None:
    bench = Bench(max_running=1)
    bench.add("low", [1, 2])
    bench.add("high", [3, 4], priority=1)
    assert bench.step() == [("high", 0, 2)]


def test_what_others_computed_meanwhile_counts_in_the_queue() -> None:
    bench = Bench(max_running=1)
    bench.add("a", [1, 2, 3, 4, 5], max_tokens=1)
    bench.add("b", [7, 7, 7, 7, 7, 7], max_tokens=1)
    bench.add("c", [1, 2, 3, 4, 6], max_tokens=1)
    assert [bench.step()[0] for _ in range(3)] == [("a", 0, 5), ("c", 4, 1), ("b", 0, 6)]


def crowd() -> Bench:
    """An engine with 20 pages, of which one that runs has four, and so 16 but for the pages it has to be left."""
    bench = Bench(pages=20, page_size=4, ageing_s=1.0)
    bench.add("runs", [1] * 12, max_tokens=20)
    bench.step()
    return bench


def test_an_aged_sequence_that_lacks_pages_keeps_younger_ones_from_taking_them() -> None:
    bench = crowd()
    large = bench.add("large", [2] * 56, max_tokens=4)
    reserved = make_seq("reserved", [4] * 3, max_tokens=1)
    bench.clock.now += 5.0
    bench.step()
    assert bench.engine.reserve(reserved) is None
    small = bench.add("small", [3] * 3, max_tokens=1)
    bench.step()
    assert bench.states(large, small) == [SeqState.WAITING, SeqState.WAITING]
    bench.engine.cancel("large")
    assert bench.engine.reserve(reserved) == 0
    bench.engine.landed(reserved, 0)
    bench.drain(reserved, small)


def test_an_older_sequence_that_waits_for_kv_and_pages_goes_before_younger_local_ones() -> None:
    bench = crowd()
    moved = make_seq("moved", [2] * 56, max_tokens=4)
    assert bench.engine.reserve(moved) is None
    bench.clock.now += 5.0
    small = bench.add("small", [3] * 3, max_tokens=1)
    bench.step()
    assert bench.states(moved, small) == [SeqState.WAITING_KV, SeqState.WAITING]
    assert bench.engine.reserve(make_seq("younger", [5], max_tokens=1)) is None
    bench.engine.cancel("younger")
    bench.engine.landed(moved, 0)
    bench.drain(moved, small)


def test_a_reservation_that_is_not_aged_yet_keeps_nobody_waiting() -> None:
    bench = crowd()
    assert bench.engine.reserve(make_seq("moved", [2] * 56, max_tokens=4)) is None
    bench.add("small", [3] * 3, max_tokens=1)
    assert ("small", 0, 3) in bench.step()
    bench.engine.cancel("moved")
    bench.drain()


def test_retraction_takes_the_youngest_and_loses_no_token() -> None:
    bench = Bench(pages=60, page_size=1)
    seqs = [bench.add(name, [index, 5], max_tokens=30) for index, name in enumerate("abc")]
    retracted: list[str] = []
    while bench.engine.has_work():
        retracted += [seq.seq_id for seq in bench.engine.step().retracted]
        bench.engine.check_integrity()
    assert retracted[:2] == ["c", "b"]
    assert "a" not in retracted
    bench.drain(*seqs)


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_crowded_sequences_are_retracted_and_finish(page_size: int) -> None:
    bench = Bench(pages=48 // page_size, page_size=page_size, max_batch_tokens=16)
    seqs = [bench.add(f"s{index}", [index, 1, 2], max_tokens=30) for index in range(6)]
    bench.drain(*seqs, steps=2000)
    assert bench.engine.status().retractions == sum(seq.retractions for seq in seqs) > 0
    assert seqs[0].retractions == 0


def test_waiting_counts_from_a_retraction_and_not_from_an_arrival_long_ago() -> None:
    bench = Bench(pages=40, page_size=1)
    bench.add("old", [1, 2], max_tokens=30)
    young = bench.add("young", [3, 4], max_tokens=30)
    bench.clock.now += 5.0
    assert bench.engine.status().oldest_s == 5.0
    while not young.retractions:
        bench.step()
        bench.clock.now += 1.0
    assert young.state is SeqState.WAITING
    assert young.arrival == 100.0, "its age still counts in the queue"
    assert bench.engine.status().oldest_s == 1.0
    bench.engine.cancel("old")
    bench.drain(young)


def test_a_retracted_sequence_finds_its_own_pages_again() -> None:
    bench = Bench(pages=40, page_size=1)
    old, young = bench.add("old", [1, 2], max_tokens=30), bench.add("young", [3, 4], max_tokens=30)
    for _ in range(30):
        if young.retractions:
            break
        bench.step()
    assert young.retractions == 1
    kept = bench.engine.match_len(young.root, young.tokens)
    assert kept > 0
    bench.engine.cancel("old")
    rows = bench.step()
    assert rows[0][:2] == ("young", kept)
    bench.drain(young)
    assert old.tokens[2:] == naive_continuation(old.tokens[:2], old.sampling)[: old.output_len]


def test_one_sequence_can_use_every_page() -> None:
    bench = Bench(pages=5, page_size=4, max_batch_tokens=8)
    seqs = [bench.add(name, [index] * 11, max_tokens=9) for index, name in enumerate("ab")]
    bench.drain(*seqs)


@pytest.mark.parametrize("older", [False, True])
def test_a_landed_sequence_that_waits_gives_way_to_the_last_that_runs(older: bool) -> None:
    """Minimal pages: otherwise neither could ever go on."""
    bench = Bench(pages=40, page_size=1, max_running=1)
    moved = make_seq("moved", [3] * 8, max_tokens=4)
    if older:
        assert bench.engine.reserve(moved) == 0
    runs = bench.add("runs", [1, 2], max_tokens=38, priority=1)
    bench.step()
    if not older:
        assert bench.engine.reserve(moved) == 0
    bench.engine.landed(moved, 0)
    assert (moved.order < runs.order, len(moved.pages[0])) == (older, 8)
    bench.drain(runs, moved)
    assert (moved.retractions, runs.retractions) == (1, 0)


def test_the_last_that_runs_pauses_while_all_else_is_being_handed_over() -> None:
    bench = Bench(pages=40, page_size=1)
    runs = bench.add("runs", [1, 2], max_tokens=38)
    bench.step()
    moved = make_seq("moved", [3] * 8, max_tokens=4)
    assert bench.engine.reserve(moved) == 0
    for _ in range(40):
        output = bench.engine.step()
    assert (output.batch_tokens, output.advanced, runs.computed) == (0, False, 32)
    bench.engine.landed(moved, 0)
    bench.drain(runs, moved)


def test_half_opened_sequences_do_not_lock_each_other_out() -> None:
    """Each holds a cached half of the pages and needs the other's."""
    bench = Bench(pages=12, page_size=1)
    for start in (10, 20):
        warm(bench, list(range(start, start + 6)))
    seqs = [bench.add(f"p{start}", list(range(start, start + 10)), prefill_only=True) for start in (10, 20)]
    assert [bench.engine.open_cached(seq) for seq in seqs] == [6, 6]
    bench.step()
    assert [seq.state for seq in seqs] == [SeqState.HELD, SeqState.WAITING]
    bench.engine.release(seqs[0])
    bench.step()
    bench.engine.release(seqs[1])
    bench.drain()


@pytest.mark.parametrize("pushed", [False, True])
def test_a_held_sequence_gives_way_to_an_older_one_unless_it_is_being_pushed(pushed: bool) -> None:
    """Its receiver may lack the very pages that wait for the older one's KV."""
    bench = Bench(pages=12, page_size=1)
    older = bench.add("older", [1] * 8, prefill_only=True)
    younger = bench.add("younger", [2] * 8, prefill_only=True, priority=1)
    assert bench.step() == [("younger", 0, 8)]
    assert bench.states(older, younger) == [SeqState.WAITING, SeqState.HELD]
    if pushed:
        bench.engine.export_span(younger, Span(0, 4), bytearray(LAYOUT.span_bytes(Span(0, 4), 8)))
        assert bench.step() == []
        bench.engine.release(younger)
    assert bench.step() == [("older", 0, 8)]
    assert bench.states(older, younger) == [SeqState.HELD, SeqState.FINISHED if pushed else SeqState.WAITING]
    bench.engine.release(older)
    if not pushed:
        bench.step()
        bench.engine.release(younger)
    bench.drain()


def test_a_held_sequence_never_gives_way_to_a_younger_one() -> None:
    bench = Bench(pages=12, page_size=1)
    first = bench.add("first", [1] * 8, prefill_only=True)
    bench.step()
    bench.add("late", [2] * 8, prefill_only=True)
    assert bench.step() == []
    assert (first.state, first.retractions) == (SeqState.HELD, 0)
    bench.engine.release(first)
    assert bench.step() == [("late", 0, 8)]


@pytest.mark.parametrize("change", ["cancelled", "aged", "fits"])
def test_a_queue_at_a_standstill_is_looked_at_again_once_something_changes(change: str) -> None:
    bench = Bench(pages=10, page_size=4, ageing_s=5.0)
    runs = bench.add("runs", [1] * 8, max_tokens=24)
    bench.step()
    large = bench.add("large", [1] * 8 + [2] * 20, max_tokens=2)
    bench.step()
    small = bench.add("small", [3] * 3, max_tokens=1, arrival=98.0)
    bench.step()
    bench.step()
    assert (large.state, small.state) == (SeqState.WAITING, SeqState.WAITING)
    if change == "cancelled":
        bench.engine.cancel("large")
    elif change == "aged":
        bench.clock.now = 103.0
    else:
        bench.engine.cancel("runs")
    rows = [row[0] for row in bench.step()]
    assert rows == {"cancelled": ["runs", "small"], "aged": ["runs", "small"], "fits": ["large"]}[change]
    bench.clock.now += 5.0
    bench.drain(*([] if change == "fits" else [runs, small]))
