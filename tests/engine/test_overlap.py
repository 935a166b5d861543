"""Steps launched behind steps in flight: outputs are the same, and what overran or was cancelled leaves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Batch, Draft, Sampled, Seq, SeqState
from tandem.kv import KvLayout, Span
from tandem.testing.drafter import GuessingDrafter
from tandem.testing.engine import (
    LAYOUT,
    VOCAB,
    FakeFlight,
    FakePool,
    FakeRunner,
    make_seq,
    naive_continuation,
    windowed_layout,
)
from tandem.types import FinishReason, SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Device(FakeRunner):
    """Notes in which order it is told and asked, and fails or finds no number where it is told to."""

    def __init__(self, pool: FakePool) -> None:
        super().__init__(pool)
        self.events: list[str] = []
        self.futures = 0
        """Rows whose input was a future token."""
        self.fails_at: str | None = None
        self.broken: tuple[str, int] | None = None
        """A sequence, and the position whose logits are no numbers."""

    def launch(self, batch: Batch, after: FakeFlight | None = None) -> FakeFlight:
        self._note("launch" if after is None else "ahead")
        flight = super().launch(batch, after)
        self.futures += sum(row.future for row in batch.rows)
        for at, row in enumerate(batch.rows):
            if self.broken == (row.seq.seq_id, row.start + row.count - 1):
                flight.sampled[at] = Sampled(None)
        return flight

    def collect(self, flight: FakeFlight) -> list[Sampled]:
        if self.fails_at == "collect":
            self._flying.clear()
        self._note("collect")
        return super().collect(flight)

    def _note(self, event: str) -> None:
        if self.fails_at == event:
            self.fails_at = None
            raise RuntimeError("device lost")
        self.events.append(event)


def make(
    pages: int | Sequence[int] = 64, page_size: int = 4, layout: KvLayout = LAYOUT, **limits: Any
) -> tuple[Engine, Device]:
    pool = FakePool(pages, page_size, layout)
    device = Device(pool)
    limits.setdefault("overlap", True)
    return Engine(device, pool, EngineConfig(**limits)), device


def run(engine: Engine, seqs: Iterable[Seq] = ()) -> list[StepOutput]:
    for seq in seqs:
        engine.add(seq)
    outputs = []
    while engine.has_work():
        outputs.append(engine.step())
        engine.check_integrity()
        assert outputs[-1].advanced
    assert engine.idle_leaks() == []
    return outputs


def expected(seq: Seq, layout: KvLayout = LAYOUT) -> list[int]:
    return naive_continuation(seq.tokens[: seq.prompt_len], seq.sampling, seq.eos_ids, layout)


def output_of(seq: Seq) -> list[int]:
    return seq.tokens[seq.prompt_len :]


def rows_of(device: Device, name: str) -> list[tuple[int, int]]:
    return [(start, count) for batch in device.batches for row, start, count in batch if row == name]


def test_the_next_step_is_launched_before_the_last_one_is_looked_at() -> None:
    engine, device = make()
    seq = make_seq("a", PROMPT, 4)
    outputs = run(engine, [seq])
    assert device.events == ["launch", "ahead", "collect", "ahead", "collect", "ahead", "collect", "collect"]
    assert output_of(seq) == expected(seq)
    assert [[(made.first_index, made.tokens) for made in step.outputs] for step in outputs] == [
        [(index, (token,))] for index, token in enumerate(output_of(seq))
    ]
    assert [step.batch_tokens for step in outputs] == [11, 1, 1, 1]
    assert device.futures == 3
    engine, device = make(overlap=False)
    run(engine, [make_seq("a", PROMPT, 4)])
    assert device.events == ["launch", "collect"] * 4
    assert device.futures == 0


@pytest.mark.parametrize("budget", [3, 6, 64])
@pytest.mark.parametrize("windows", [(None,), (5,), (None, 8)])
def test_outputs_are_those_of_steps_one_at_a_time(windows: tuple[int | None, ...], budget: int) -> None:
    layout = windowed_layout(*windows)
    engine, device = make([100] * len(windows), 2, layout, max_batch_tokens=budget, max_running=4)
    seqs = [make_seq(f"s{n}", (PROMPT * 3)[n : 2 * n + 9], 3 + 2 * n, eos_ids=frozenset({n})) for n in range(8)]
    run(engine, seqs)
    for seq in seqs:
        assert output_of(seq) == expected(seq, layout)
    assert device.futures > 20


def test_a_token_behind_the_end_is_dropped_and_its_page_kept_until_then() -> None:
    engine, device = make(page_size=1)
    free = expected(make_seq("a", PROMPT, 20))
    end, length = free[5], free.index(free[5]) + 1
    seq = make_seq("a", PROMPT, 20, eos_ids=frozenset({end}))
    engine.add(seq)
    while seq.finish is None:
        engine.step()
        engine.check_integrity()
    assert (seq.finish, seq.stop_token, seq.output_len) == (FinishReason.STOP, end, length)
    total = len(PROMPT) + length
    assert rows_of(device, "a")[-1] == (total - 1, 1), "its last token was on its way"
    assert (seq.state, "a" in engine.seqs, len(seq.pages[0])) == (SeqState.FINISHED, False, total)
    assert engine.has_work()
    assert "a step is in flight" in engine.idle_leaks()
    assert engine.step().outputs == ()
    assert (seq.pages, engine.has_work(), engine.idle_leaks()) == ([], False, [])
    assert engine.memory.cached_pages == total - 1, "the overrun token's KV is nobody's"
    # With the last token that was asked for, nothing overruns.
    run(engine, [make_seq("b", PROMPT, 6)])
    assert rows_of(device, "b")[-1] == (len(PROMPT) + 4, 1)


def test_a_sequence_without_numbers_ends_and_its_next_row_is_dropped() -> None:
    engine, device = make()
    device.broken = "a", len(PROMPT) + 1
    seqs = [make_seq("a", PROMPT, 9), make_seq("b", PROMPT[::-1], 9)]
    run(engine, seqs)
    assert (seqs[0].finish, seqs[0].output_len) == (FinishReason.ERROR, 2)
    assert rows_of(device, "a")[-1] == (len(PROMPT) + 2, 1)
    assert output_of(seqs[1]) == expected(seqs[1])


def test_who_is_cancelled_in_flight_gets_no_more_and_keeps_its_pages_until_then() -> None:
    engine, _ = make(page_size=1)
    seqs = [make_seq("a", PROMPT[:6], 9), make_seq("b", PROMPT[:2], 3)]
    for seq in seqs:
        engine.add(seq)
    engine.step()
    engine.cancel("a")
    assert (seqs[0].finish, "a" in engine.seqs) == (FinishReason.CANCELLED, False)
    assert len(seqs[0].pages[0]) == 7
    engine.check_integrity()
    engine.add(make_seq("a", PROMPT, 2))  # the name is free at once
    assert [made.seq for made in engine.step().outputs] == [seqs[1]]
    assert (seqs[0].pages, output_of(seqs[0])) == ([], expected(seqs[0])[:1])
    run(engine)
    assert output_of(seqs[1]) == expected(seqs[1])


def test_who_waited_for_the_pages_of_one_that_was_cancelled_in_flight_gets_them() -> None:
    engine, _ = make(pages=20, page_size=2, prefix_cache=False)
    runs, waits = make_seq("runs", PROMPT[:3], 30), make_seq("waits", PROMPT[::-1], 4)
    for seq in (runs, make_seq("a", PROMPT[:9], 6)):
        engine.add(seq)
    engine.step()
    engine.add(waits)
    engine.step()
    engine.cancel("a")
    engine.step()
    assert engine.status().waiting == 1, "the pages are given back with the step that was in flight"
    engine.step()
    assert engine.status().waiting == 0
    run(engine)
    for seq in (runs, waits):
        assert output_of(seq) == expected(seq)


def test_who_waits_with_pages_gives_way_once_nothing_is_in_flight() -> None:
    engine, _ = make(pages=8, page_size=2)
    run(engine, [make_seq("warm", PROMPT[:8], 1)])
    engine.add(make_seq("a", PROMPT[5:], 2))
    opened = make_seq("opened", [*PROMPT[:8], 1, 1], prefill_only=True)
    waits = make_seq("waits", PROMPT[::-1], 4, priority=1)
    engine.step()
    engine.add(waits)
    engine.add(opened)
    assert engine.open_cached(opened) == 8
    engine.cancel("a")
    retracted = [seq for _ in range(3) for seq in engine.step().retracted]
    assert (retracted, opened.retractions, engine.status().retractions) == ([opened], 1, 1)
    engine.cancel("opened")
    run(engine)
    assert output_of(waits) == expected(waits)


def test_nobody_is_retracted_while_a_step_is_in_flight() -> None:
    engine, device = make(pages=14, page_size=2, max_running=4, prefix_cache=False)
    retract, seen = engine.scheduler.retract, list[bool]()

    def watched(victim: Seq, plan: Any) -> None:
        seen.append(plan.ahead or any(seq.flying for seq in engine.seqs.values()))
        retract(victim, plan)

    engine.scheduler.retract = watched  # type: ignore[method-assign]
    seqs = [make_seq(f"s{n}", PROMPT[n : n + 5], 12) for n in range(4)]
    outputs = run(engine, seqs)
    assert seen and not any(seen)
    assert sum(len(step.retracted) for step in outputs) == engine.status().retractions == len(seen)
    for seq in seqs:
        assert output_of(seq) == expected(seq)
    assert device.futures > 10


class Anything:
    """A grammar that binds nothing, and puts one token behind each."""

    active, stuck, ends = True, False, frozenset[int]()

    @property
    def finished(self) -> bool:
        return False

    def fill(self, mask: Any, row: int) -> None:
        """The device that is none asks for no mask."""

    def accept(self, token: int) -> None:
        """It allows all."""

    def prune(self, draft: Draft) -> Draft:
        return draft

    def fill_draft(self, draft: Draft, mask: Any, row: int) -> None:
        """See `fill`."""

    def force(self, limit: int) -> list[int]:
        return [7][:limit]


@pytest.mark.parametrize("name", ["penalty", "grammar"])
def test_who_needs_its_last_token_on_the_host_goes_one_step_at_a_time(name: str) -> None:
    engine, device = make(max_batch_tokens=4)
    seq = make_seq("a", PROMPT, 8)
    if name == "grammar":
        seq.constraint = Anything()
    else:
        seq.sampling = replace(GREEDY, frequency_penalty=0.5)
    run(engine, [seq])
    # Chunks of its prompt follow one another; behind what samples, nothing does. Forced tokens need fewer steps.
    chunks, decoding = ["launch", "ahead", "collect", "ahead", "collect", "collect"], 7 if name == "penalty" else 3
    assert device.events == chunks + ["launch", "collect"] * decoding
    assert device.futures == 0
    assert len(output_of(seq)) == 8
    # At its last token it holds nobody up.
    other = make_seq("b", PROMPT, 9)
    del device.events[:]
    run(engine, [make_seq("c", PROMPT[:3], 1, sampling=replace(seq.sampling, max_tokens=1)), other])
    assert device.events[:3] == ["launch", "ahead", "collect"]


def test_the_least_length_and_the_last_token_are_known_ahead() -> None:
    engine, device = make()
    ends = frozenset(expected(make_seq("a", PROMPT, 9))[:4])
    seq = make_seq("a", PROMPT, sampling=replace(GREEDY, min_tokens=5, max_tokens=30), eos_ids=ends)
    run(engine, [seq])
    assert output_of(seq) == expected(seq)
    assert len(output_of(seq)) > 5
    assert device.futures >= 4
    zero = make_seq("b", PROMPT, 0)
    run(engine, [zero])
    assert (zero.finish, len(rows_of(device, "b"))) == (FinishReason.LENGTH, 1)


@pytest.mark.parametrize("event", ["launch", "ahead", "collect"])
def test_a_failure_advances_nothing(event: str) -> None:
    engine, device = make(max_batch_tokens=20)
    seqs = [make_seq("a", PROMPT, 6), make_seq("b", [*PROMPT, 8], 6)]
    engine.add(seqs[0])
    for _ in range(0 if event == "launch" else 3):
        engine.step()
    before = list(seqs[0].tokens), seqs[0].computed
    engine.add(seqs[1])
    device.fails_at = event
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    engine.check_integrity()
    assert (seqs[0].tokens, seqs[0].computed) == before
    run(engine)
    for seq in seqs:
        assert output_of(seq) == expected(seq)


def test_those_who_end_in_a_step_that_fails_leave_nothing() -> None:
    engine, device = make()
    engine.add(make_seq("a", PROMPT, 6))
    engine.step()
    engine.cancel("a")
    device.fails_at = "collect"
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert (engine.has_work(), engine.idle_leaks()) == (False, [])


def test_a_prompt_is_handed_over_as_its_steps_are_committed() -> None:
    engine, device = make(max_batch_tokens=4)
    seq = make_seq("p", PROMPT, prefill_only=True)
    engine.add(seq)
    computed, states = list[int](), list[SeqState]()
    while engine.has_work():
        computed += [part.computed for part in engine.step().progress]
        states.append(seq.state)
        engine.check_integrity()
        with pytest.raises(ValueError, match="must lie in"):
            engine.export_span(seq, Span(computed[-1], 1), bytearray(24))
    assert (computed, device.futures) == ([4, 8, 11], 0)
    assert states == [SeqState.RUNNING, SeqState.RUNNING, SeqState.HELD]
    engine.release(seq)
    # What needs no computing is reported behind a step in flight, too.
    engine.add(make_seq("long", PROMPT[::-1], 3))
    engine.step()
    twin = make_seq("q", PROMPT[:8], prefill_only=True)
    engine.add(twin)
    progress = [part for _ in range(3) for part in engine.step().progress if part.seq is twin]
    assert [part.computed for part in progress] == [8]
    engine.release(twin)
    run(engine)


def test_pages_are_reserved_and_filled_while_a_step_is_in_flight() -> None:
    engine, _ = make(page_size=2)
    source, _ = make(page_size=4, overlap=False)
    twin = make_seq("b", PROMPT[:-1], prefill_only=True)
    source.add(twin)
    source.step()
    runs, seq = make_seq("a", PROMPT[::-1], 12), make_seq("b", PROMPT, 5, state=SeqState.WAITING_KV)
    engine.add(runs)
    engine.step()
    assert engine.reserve(seq) == 0
    data = bytearray(24 * len(twin.tokens))
    source.export_span(twin, Span(0, len(twin.tokens)), data)
    engine.step()
    engine.import_span(seq, Span(0, len(twin.tokens)), data)
    engine.landed(seq, len(twin.tokens))
    run(engine)
    for each in (runs, seq):
        assert output_of(each) == expected(each)


def test_an_engine_that_drafts_does_not_overlap() -> None:
    pool = FakePool(64, 4)
    device, seq = Device(pool), make_seq("a", PROMPT, 9)
    drafter = GuessingDrafter(expected, VOCAB, trees=False, seed=1)
    engine = Engine(device, pool, EngineConfig(max_batch_tokens=4, overlap=True), drafter=drafter)
    run(engine, [seq])
    assert output_of(seq) == expected(seq)
    assert "ahead" not in device.events
