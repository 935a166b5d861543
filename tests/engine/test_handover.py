from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Seq, SeqState
from tandem.kv import Span
from tandem.testing.engine import LAYOUT, FakePool, FakeRunner, make_seq, naive_continuation

PROMPT = [(7 * index) % 45 for index in range(41)]


def make(page_size: int = 4, tokens: int = 256, budget: int = 16) -> tuple[Engine, FakeRunner]:
    pool = FakePool(tokens // page_size, page_size)
    runner = FakeRunner(pool)
    return Engine(runner, pool, EngineConfig(max_batch_tokens=budget)), runner


def drain(engine: Engine) -> None:
    while engine.has_work():
        assert engine.step().advanced
        engine.check_integrity()


def prefill(engine: Engine, name: str, tokens: list[int]) -> tuple[Seq, list[int]]:
    """Computes a prefill-only sequence; returns it and its progress."""
    seq = make_seq(name, tokens, prefill_only=True)
    engine.add(seq)
    progress = []
    while seq.state is not SeqState.HELD:
        progress += [part.computed for part in engine.step().progress if part.seq is seq]
        engine.check_integrity()
    return seq, progress


def move(sender: Engine, source: Seq, receiver: Engine, target: Seq, start: int, end: int, step: int = 7) -> None:
    for at in range(start, end, step):
        span = Span(at, min(step, end - at))
        data = bytearray(LAYOUT.span_bytes(span, len(source.tokens)))
        sender.export_span(source, span, data)
        receiver.import_span(target, span, memoryview(data))


@pytest.mark.parametrize("sizes", [(4, 4), (1, 16), (16, 1), (64, 4)])
@pytest.mark.parametrize("cached", [0, 5, 20, 40])
def test_imported_is_computed(sizes: tuple[int, int], cached: int) -> None:
    (sender, _), (receiver, runner) = make(sizes[0]), make(sizes[1])
    if cached:
        receiver.add(make_seq("warm", PROMPT[:cached], max_tokens=1))
        drain(receiver)
    source, progress = prefill(sender, "p", PROMPT[:-1])
    assert progress[-1] == 40
    seq = make_seq("d", PROMPT)
    have = receiver.reserve(seq)
    assert have is not None
    assert have == cached // sizes[1] * sizes[1] == seq.cached_tokens
    receiver.check_integrity()
    move(sender, source, receiver, seq, have, 40)
    sender.release(source)
    receiver.landed(seq, 40)
    receiver.check_integrity()
    assert (seq.state, seq.computed, seq.pending) == (SeqState.WAITING, 40, 1)
    assert receiver.match_len(seq.root, PROMPT) == 40 // sizes[1] * sizes[1]
    drain(receiver)
    first = next(rows for rows in runner.batches if rows[0][0] == "d")
    assert first == (("d", 40, 1),)
    assert seq.tokens[41:] == naive_continuation(PROMPT, seq.sampling)
    assert sender.idle_leaks() == receiver.idle_leaks() == []


@pytest.mark.parametrize("landed", [0, 7, 16, 33])
def test_what_did_not_land_is_computed(landed: int) -> None:
    (sender, _), (receiver, _) = make(), make()
    source, _ = prefill(sender, "p", PROMPT[:-1])
    seq = make_seq("d", PROMPT)
    assert receiver.reserve(seq) == 0
    move(sender, source, receiver, seq, 0, landed)
    receiver.landed(seq, landed)
    drain(receiver)
    assert seq.tokens[41:] == naive_continuation(PROMPT, seq.sampling)
    assert receiver.idle_leaks() == []


def test_a_fallback_before_any_pages_computes_everything() -> None:
    receiver, _ = make()
    seq = make_seq("d", PROMPT, state=SeqState.WAITING_KV)
    receiver.add(seq)
    assert not receiver.has_work()
    receiver.landed(seq, 0)
    drain(receiver)
    assert seq.tokens[41:] == naive_continuation(PROMPT, seq.sampling)


def test_what_was_cached_at_reserve_counts_even_if_nothing_landed() -> None:
    receiver, runner = make(page_size=1)
    receiver.add(make_seq("warm", PROMPT[:20], max_tokens=1))
    drain(receiver)
    seq = make_seq("d", PROMPT)
    assert receiver.reserve(seq) == 20
    receiver.landed(seq, 0)
    drain(receiver)
    assert next(rows for rows in runner.batches if rows[0][0] == "d") == (("d", 20, 16),)
    assert seq.tokens[41:] == naive_continuation(PROMPT, seq.sampling)


def test_a_partly_cached_page_is_copied_before_spans_land() -> None:
    (sender, _), (receiver, _) = make(16), make(16)
    receiver.add(make_seq("warm", PROMPT[:32], max_tokens=1))
    drain(receiver)
    other = [*PROMPT[:25], 49, *PROMPT[26:]]
    source, _ = prefill(sender, "p", other[:-1])
    seq = make_seq("d", other)
    assert receiver.reserve(seq) == 25
    move(sender, source, receiver, seq, 25, 40)
    receiver.landed(seq, 40)
    drain(receiver)
    assert seq.tokens[41:] == naive_continuation(other, seq.sampling)


def test_prefill_reports_each_chunk_and_all_of_it_at_once_when_cached() -> None:
    engine, runner = make(page_size=4)
    first, progress = prefill(engine, "p", PROMPT[:-1])
    assert progress == [16, 32, 40]
    second, progress = prefill(engine, "q", PROMPT[:-1])
    assert progress == [40]
    assert len(runner.batches) == 3
    assert second.pages == first.pages
    engine.release(first)
    engine.release(second)
    assert engine.idle_leaks() == []
    assert first.state is SeqState.FINISHED


def test_held_pages_survive_pressure_until_released() -> None:
    engine, _ = make(page_size=1, tokens=64)
    held, _ = prefill(engine, "p", PROMPT[:-1])
    before = bytearray(LAYOUT.span_bytes(Span(0, 40), 40))
    engine.export_span(held, Span(0, 40), before)
    small = [make_seq(f"s{index}", [index] * 6, max_tokens=6) for index in range(8)]
    for seq in small:
        engine.add(seq)
    drain(engine)
    after = bytearray(LAYOUT.span_bytes(Span(0, 40), 40))
    engine.export_span(held, Span(0, 40), after)
    assert before == after
    engine.release(held)
    assert engine.idle_leaks() == []


def test_cached_tokens_can_be_exported_before_their_turn() -> None:
    engine, _ = make(page_size=16)
    done, _ = prefill(engine, "p", PROMPT[:-1])
    engine.release(done)
    seq = make_seq("q", [*PROMPT[:20], 3, 3, 3], prefill_only=True)
    engine.add(seq)
    assert engine.open_cached(seq) == 20
    engine.check_integrity()
    data = bytearray(LAYOUT.span_bytes(Span(0, 20), 23))
    engine.export_span(seq, Span(0, 20), data)
    assert seq.state is SeqState.WAITING
    drain(engine)
    assert (seq.state, seq.computed, seq.cached_tokens) == (SeqState.HELD, 23, 20)
    engine.release(seq)
    assert engine.idle_leaks() == []


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_prefix_that_was_opened_early_grows_with_what_others_compute_meanwhile(page_size: int) -> None:
    """Prompts that arrive together: each locks the little that is cached, and only the first computes the rest."""
    engine, runner = make(page_size)
    first, _ = prefill(engine, "warm", PROMPT[:page_size])
    engine.release(first)
    runner.batches.clear()
    seqs = [make_seq(f"q{number}", [*PROMPT, 1, 2, number], prefill_only=True) for number in range(4)]
    for seq in seqs:
        engine.add(seq)
    assert [engine.open_cached(seq) for seq in seqs] == [page_size] * 4
    drain(engine)
    assert {seq.state for seq in seqs} == {SeqState.HELD}
    computed = sum(count for batch in runner.batches for _, _, count in batch)
    # The second may start in the first one's last step; whoever comes later lacks what whole pages do not hold.
    assert computed <= 44 - page_size + 16 + 3 * (44 - 43 // page_size * page_size)
    status = engine.status()
    assert (status.prompt_tokens, status.matched_tokens) == (page_size + 4 * 44, sum(seq.cached_tokens for seq in seqs))
    for seq in seqs:
        data = bytearray(LAYOUT.span_bytes(Span(0, 44), 44))
        engine.export_span(seq, Span(0, 44), data)
        engine.release(seq)
    assert engine.idle_leaks() == []


def test_opening_what_is_wholly_cached_holds_it_without_a_step() -> None:
    engine, runner = make(page_size=4)
    done, _ = prefill(engine, "p", PROMPT[:-1])
    engine.release(done)
    steps = len(runner.batches)
    seq = make_seq("q", PROMPT[:-1], prefill_only=True)
    engine.add(seq)
    assert engine.open_cached(seq) == 40
    assert (seq.state, engine.has_work(), len(runner.batches)) == (SeqState.HELD, False, steps)
    assert engine.open_cached(seq) == 40
    engine.release(seq)


def test_reserve_evicts_but_never_retracts() -> None:
    engine, _ = make(page_size=1, tokens=64)
    engine.add(make_seq("warm", [1] * 30, max_tokens=1))
    drain(engine)
    runs = make_seq("runs", [2] * 5, max_tokens=20)
    engine.add(runs)
    engine.step()
    assert engine.reserve(make_seq("large", [3] * 50)) is None
    assert (runs.retractions, runs.state) == (0, SeqState.RUNNING)
    assert engine.reserve(make_seq("older first", [4] * 2)) is None
    engine.cancel("large")
    engine.cancel("older first")
    assert engine.reserve(make_seq("fits", [3] * 40)) == 0
    engine.check_integrity()
    engine.cancel("fits")
    drain(engine)
    assert engine.idle_leaks() == []


@pytest.mark.parametrize("span", [Span(0, 4), Span(4, 2), Span(38, 4), Span(12, 0)])
def test_spans_outside_the_missing_part_are_refused(span: Span) -> None:
    engine, _ = make(page_size=4)
    engine.add(make_seq("warm", PROMPT[:8], max_tokens=1))
    drain(engine)
    seq = make_seq("d", PROMPT)
    assert engine.reserve(seq) == 8
    with pytest.raises(ValueError, match=r"must lie in \[8, 41\)"):
        engine.import_span(seq, span, bytes(LAYOUT.span_bytes(span, 40)))


def test_a_span_of_the_wrong_length_is_refused() -> None:
    engine, _ = make()
    seq = make_seq("d", PROMPT)
    engine.reserve(seq)
    with pytest.raises(ValueError, match="bytes; the span has"):
        engine.import_span(seq, Span(0, 4), bytes(24))


def test_calls_in_the_wrong_state_are_refused() -> None:
    engine, _ = make()
    seq = make_seq("d", PROMPT)
    engine.add(seq)
    calls: list[Callable[[], object]] = [
        lambda: engine.reserve(seq),
        lambda: engine.landed(seq, 0),
        lambda: engine.import_span(seq, Span(0, 1), bytes(24)),
        lambda: engine.export_span(seq, Span(0, 1), bytearray(24)),
        lambda: engine.release(seq),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"sequence d|of d"):
            call()
    moved = make_seq("e", PROMPT)
    engine.reserve(moved)
    with pytest.raises(ValueError, match="computed is 41; 40 is the limit"):
        engine.landed(moved, 41)


def test_a_second_reserve_changes_nothing() -> None:
    """Who asked first may have been given up before the answer came; the next sender's sink asks again."""
    engine, _ = make()
    engine.add(make_seq("warm", PROMPT[:8], max_tokens=1))
    drain(engine)
    seq = make_seq("d", PROMPT)
    assert engine.reserve(seq) == 8
    pages = [list(run) for run in seq.pages]
    assert engine.reserve(seq) == 8
    assert seq.pages == pages
    engine.check_integrity()
    engine.cancel("d")
    assert engine.idle_leaks() == []
