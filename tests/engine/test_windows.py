"""Layer groups with a window: they keep and move only what is seen, and the cache stays right."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.radix import NO_PAGE, pack
from tandem.engine.sequence import Seq, SeqState
from tandem.engine.windows import kept_from, most_pages, running_pages
from tandem.errors import ContextTooLong
from tandem.kv import LayerGroup, Span
from tandem.testing.engine import FakePool, FakeRunner, make_seq, naive_continuation, windowed_layout

Windows = Sequence[int | None]
FULL_AND_8: Windows = (None, 8)
LONG = random.Random(3).choices(range(41), k=600)


def make(windows: Windows, pages: Sequence[int], page_size: int = 4, chunk: int = 16, **more: Any) -> Engine:
    pool = FakePool(pages, page_size, windowed_layout(*windows))
    return Engine(FakeRunner(pool), pool, EngineConfig(max_batch_tokens=chunk, **more))


def drain(engine: Engine) -> None:
    while engine.has_work():
        assert engine.step().advanced
        engine.check_integrity()


def answer(engine: Engine, name: str, prompt: Sequence[int], max_tokens: int = 4) -> Seq:
    """Runs a sequence to its end, which must be the naive one."""
    seq = make_seq(name, prompt, max_tokens=max_tokens)
    engine.add(seq)
    drain(engine)
    check(engine, seq)
    return seq


def check(engine: Engine, seq: Seq) -> None:
    assert seq.tokens[seq.prompt_len :] == naive_continuation(
        seq.tokens[: seq.prompt_len], seq.sampling, layout=engine.layout
    )


def held(seq: Seq, group: int) -> int:
    return len(seq.pages[group]) - seq.pages[group].count(NO_PAGE) if seq.pages else 0


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [2, 8, 17])
@pytest.mark.parametrize("chunk", [5, 16])
def test_the_pages_that_are_held_are_those_of_the_window_and_a_chunk(page_size: int, window: int, chunk: int) -> None:
    """As many as `running_pages` says, and not one more; a pool of only that many is enough."""
    group = LayerGroup((0,), window)
    most = most_pages(group, chunk, page_size)
    assert most is not None
    engine = make((None, window), (400 // page_size, most), page_size, chunk)
    seq = make_seq("s", LONG[:300], max_tokens=60)
    engine.add(seq)
    seen = 0
    while engine.has_work():
        assert engine.step().retracted == ()
        engine.check_integrity()
        seen = max(seen, held(seq, 1))
        assert held(seq, 0) * page_size >= seq.computed or seq.finish
    check(engine, seq)
    bound = running_pages(group, chunk, page_size)
    assert bound is not None
    assert bound - 1 <= seen <= bound <= -(-(window + chunk) // page_size) + 2
    assert engine.memory.pools[1].num_pages < 300 // page_size


def test_where_all_layers_have_windows_a_sequence_is_longer_than_the_memory() -> None:
    engine = make((8,), (32,))
    assert engine.capacity_tokens == sys.maxsize
    answer(engine, "s", LONG[:500])
    assert engine.idle_leaks() == []
    small = make((8,), (31,))
    assert small.capacity_tokens == 31 * 4, "both ends of a hand-over need 32 pages"
    with pytest.raises(ContextTooLong, match="this worker holds 124"):
        small.add(make_seq("s", LONG[:500]))


def test_what_is_free_is_what_the_scarcest_group_has() -> None:
    engine = make(FULL_AND_8, (100, 50))
    assert (engine.status().free_pages, engine.status().total_pages) == (100, 100)
    seq = make_seq("s", LONG[:20], max_tokens=8)
    engine.add(seq)
    engine.step()
    assert (held(seq, 0), held(seq, 1)) == (5, 5)
    assert engine.status().free_pages == 90
    windows_first = make((8, None), (50, 100))
    assert windows_first.status().total_pages == 100


def test_an_admission_waits_for_pages_of_every_group() -> None:
    engine = make(FULL_AND_8, (100, 32), chunk=200)
    seqs = [make_seq(f"s{number}", [number] * 50, max_tokens=6) for number in range(3)]
    for seq in seqs:
        engine.add(seq)
    engine.step()
    assert [seq.state for seq in seqs] == [SeqState.RUNNING, SeqState.RUNNING, SeqState.WAITING]
    drain(engine)
    for seq in seqs:
        check(engine, seq)


def test_a_prefill_that_lacks_pages_of_a_window_takes_the_youngest_out_of_the_batch() -> None:
    """Others hold what it gives up, so its chunks become short, until the youngest gives way, whose row was made."""
    engine = make(FULL_AND_8, (200, 32), chunk=32)
    memory, pool = engine.memory, engine.memory.pools[1]
    older, younger = make_seq("older", LONG[:200], 2), make_seq("younger", LONG[300:304], 40, priority=1)
    for seq in (older, younger):
        engine.add(seq)
    assert engine.step().batch_tokens == 32
    taken, others = pool.allocate(pool.free_count - 1), []
    retracted: tuple[Seq, ...] = ()
    while not retracted:
        match = memory.cache.match(b"root", pack(older.tokens[: older.computed]), older.computed)
        others.append((memory.cache.acquire(match), match.pages))
        computed = older.computed
        retracted = engine.step().retracted
        assert older.computed > computed
    assert retracted == (younger,)
    assert isinstance(engine._runner, FakeRunner)
    batches = engine._runner.batches
    assert batches[1] == (("younger", 4, 1), ("older", 28, 31))
    assert [row[0] for row in batches[-1]] == ["older"]
    assert batches[-2][1][2] < 31
    for handle, pages in others:
        memory.cache.release(handle, pages)
    pool.free(taken)
    drain(engine)
    check(engine, older)
    check(engine, younger)
    assert engine.idle_leaks() == []


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(8,), (None, 8), (None, 30, 3)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_next_turn_finds_the_whole_conversation(windows: Windows, page_size: int) -> None:
    engine = make(windows, [512 // page_size] * len(windows), page_size)
    for turn in range(6):
        engine.memory.cache.evict(0 if windows[0] else 1, 10)
        first = answer(engine, f"first{turn}", LONG[40 * turn : 40 * turn + 90 + turn], max_tokens=5 + turn)
        whole = (len(first.tokens) - 1) // page_size * page_size
        second = answer(engine, f"second{turn}", [*first.tokens, 49, 48])
        assert second.cached_tokens == whole
    assert engine.idle_leaks() == []


def test_a_partly_matching_page_is_copied_in_every_group() -> None:
    engine = make(FULL_AND_8, (64, 64), page_size=16)
    answer(engine, "first", LONG[:64])
    second = answer(engine, "second", [*LONG[:57], 49, 48, 47])
    assert second.cached_tokens == 57
    assert isinstance(engine._pool, FakePool)
    assert len(engine._pool.copies) == 1


def test_without_room_for_a_copy_the_window_of_the_whole_pages_before_it_counts() -> None:
    """Position 28 sees from 19 on and 24 from 15 on: of pages of 4, the match of 28 tokens does not hold the fourth."""
    engine = make((None, 10), (11, 11))
    answer(engine, "first", LONG[:32], max_tokens=1)
    prompt = [*LONG[:27], 44, 44, 44, 44, 44]
    blocker = make_seq("blocker", [43] * 12, max_tokens=1, state=SeqState.WAITING_KV)
    assert engine.reserve(blocker) == 0
    second = make_seq("second", prompt, max_tokens=2)
    engine.add(second)
    engine.step()
    assert second.cached_tokens == 24
    engine.check_integrity()
    engine.cancel("blocker")
    drain(engine)
    check(engine, second)


def test_a_beginning_is_cached_as_long_as_its_window_is() -> None:
    engine = make(FULL_AND_8, (128, 128))
    answer(engine, "first", [*LONG[:100], *[44] * 60])
    second = answer(engine, "second", [*LONG[:100], *[43] * 60])
    assert second.cached_tokens == 100
    assert engine.memory.cache.evict(1, 200) > 20
    full = engine.memory.cache.cached(0)
    third = answer(engine, "third", [*LONG[:100], *[42] * 60])
    assert third.cached_tokens == 0
    assert engine.memory.cache.cached(0) == full + 15, "the beginning is the tree's own: only the rest is new"
    fourth = answer(engine, "fourth", [*LONG[:100], *[41] * 60])
    assert fourth.cached_tokens == 100, "who computed it again left its window in the cache"


# Hand-over ------------------------------------------------------------------------------------------------------------


def prefill(engine: Engine, tokens: Sequence[int], name: str = "p") -> Seq:
    seq = make_seq(name, tokens, prefill_only=True)
    engine.add(seq)
    while seq.state is not SeqState.HELD:
        engine.step()
        engine.check_integrity()
    return seq


def move(sender: Engine, source: Seq, receiver: Engine, target: Seq, start: int, end: int) -> int:
    """Moves in spans of 7 tokens, from the last to the first; returns the bytes."""
    moved = 0
    for at in reversed(range(start, end, 7)):
        span = Span(at, min(7, end - at))
        data = bytearray(sender.layout.span_bytes(span, len(source.tokens)))
        sender.export_span(source, span, data)
        receiver.import_span(target, span, data)
        moved += len(data)
    return moved


@pytest.mark.parametrize("windows", [(None, 8), (8,), (None, 70, 3), (30, 8)])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 16), (64, 1)])
@pytest.mark.parametrize("cached", [0, 37, 180])
def test_only_the_window_moves_and_what_is_imported_is_computed(
    windows: Windows, sizes: tuple[int, int], cached: int
) -> None:
    sender, receiver = (make(windows, [768 // size] * len(windows), size) for size in sizes)
    prompt = LONG[:250]
    if cached:
        answer(receiver, "warm", prompt[:cached], max_tokens=1)
    source = prefill(sender, prompt[:-1])
    assert all(
        held(source, g) <= -(-(250 - sender.layout.groups[g].moved_from(249)) // sizes[0]) for g in range(len(windows))
    )
    seq = make_seq("d", prompt, max_tokens=20)
    have = receiver.reserve(seq)
    assert have == cached // sizes[1] * sizes[1]
    receiver.check_integrity()
    start = max(have, receiver.layout.moved_from(249))
    moved = move(sender, source, receiver, seq, start, 249)
    # Of a window W: from the block in which token 192 - W + 1 is.
    firsts = [max(start, 0 if window is None else max(0, 193 - window) // 64 * 64) for window in windows]
    assert moved == 24 * sum(249 - first for first in firsts)
    for group, window in enumerate(windows):
        if window is not None:
            assert held(seq, group) <= -(-(250 - receiver.layout.groups[group].moved_from(249)) // sizes[1])
    sender.release(source)
    receiver.landed(seq, 249)
    receiver.check_integrity()
    assert (seq.state, seq.pending) == (SeqState.WAITING, 1)
    other = make_seq("other choice", prompt, max_tokens=3)
    receiver.add(other)
    drain(receiver)
    assert other.cached_tokens == 249 // sizes[1] * sizes[1]
    check(receiver, seq)
    check(receiver, other)
    assert sender.idle_leaks() == receiver.idle_leaks() == []


@pytest.mark.parametrize("windows", [(None, 8), (8,)])
@pytest.mark.parametrize("landed", [0, 60, 190, 240])
@pytest.mark.parametrize("cached", [0, 100])
def test_what_landed_in_part_is_of_no_use_where_the_window_began_later(
    windows: Windows, landed: int, cached: int
) -> None:
    sender, receiver = (make(windows, [256] * len(windows)) for _ in range(2))
    if cached:
        answer(receiver, "warm", LONG[:cached], max_tokens=1)
    source = prefill(sender, LONG[:249])
    seq = make_seq("d", LONG[:250], max_tokens=20)
    have = receiver.reserve(seq)
    assert have == cached
    start = max(have, receiver.layout.moved_from(249))
    move(sender, source, receiver, seq, start, max(landed, start))
    receiver.landed(seq, max(landed, start))
    receiver.check_integrity()
    assert seq.computed in (0, max(landed, start))
    drain(receiver)
    check(receiver, seq)
    assert receiver.idle_leaks() == []


def test_a_prompt_no_longer_than_its_windows_can_land_in_part() -> None:
    sender, receiver = (make((None, 128), [256] * 2) for _ in range(2))
    source = prefill(sender, LONG[:120])
    seq = make_seq("d", LONG[:121])
    assert receiver.reserve(seq) == 0
    move(sender, source, receiver, seq, 0, 77)
    receiver.landed(seq, 77)
    assert seq.computed == 77
    drain(receiver)
    check(receiver, seq)


def test_only_what_is_wholly_there_can_be_exported_without_computing() -> None:
    engine = make(FULL_AND_8, (256, 256))
    answer(engine, "conversation", LONG[:200], max_tokens=57)

    def exportable(end: int) -> bool:
        return engine.exportable(make_seq("q", LONG[:end], prefill_only=True)) == end

    assert exportable(196)
    assert engine.match_len(b"root", LONG[:196]) == 196
    first = engine.layout.groups[1].moved_from(196)
    assert first == 128
    engine.memory.cache.evict(1, 50)
    assert not exportable(196)
    assert engine.idle_leaks() == []


def test_pages_behind_the_window_can_be_had_by_others_while_a_prompt_waits_to_be_moved() -> None:
    engine = make(FULL_AND_8, (256, 48))
    source = prefill(engine, LONG[:249])
    assert held(source, 1) == -(-(249 - 128) // 4)
    answer(engine, "small", [7] * 30)
    data = bytearray(engine.layout.span_bytes(Span(100, 149), 249))
    engine.export_span(source, Span(100, 149), data)
    assert len(data) == 24 * (149 + 121)
    engine.release(source)


def test_the_first_kept_page_serves_a_match_of_whole_pages() -> None:
    """With 15 tokens behind the last whole page, a window of 16 would not reach the page that a match of it needs."""
    group = LayerGroup((0,), 16)
    assert [kept_from(group, computed, 16) for computed in (15, 16, 31, 32, 47, 48)] == [0, 0, 0, 1, 1, 2]
    assert [group.seen_from(position) for position in (0, 15, 16, 31, 32)] == [0, 0, 1, 16, 17]
