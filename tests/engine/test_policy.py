from __future__ import annotations

from typing import Any

import pytest
import torch

from tandem.cluster import StepTiming
from tandem.engine.commit import commit_row
from tandem.engine.grammar.masks import MaskFiller
from tandem.engine.policy import LEAST_CHUNK, EngineConfig, pick_victim, prefill_budget, queue_key, spare_pages
from tandem.engine.sampler import sample
from tandem.engine.sequence import Row, Sampled, Seq, SeqState
from tandem.testing.engine import make_seq
from tandem.types import FinishReason, SamplingParams, TokenLogprob


def waiting(order: int, arrival: float = 0.0, priority: int = 0) -> Seq:
    return make_seq(f"s{order}", [1, 2, 3], order=order, arrival=arrival, priority=priority)


def in_order(items: list[tuple[Seq, int]], now: float, ageing_s: float = 2.0) -> list[int]:
    return [seq.order for seq, _ in sorted(items, key=lambda item: queue_key(item[0], item[1], now, ageing_s))]


def test_the_longest_ready_prefix_goes_first() -> None:
    assert in_order([(waiting(1), 0), (waiting(2), 64), (waiting(3), 16)], now=1.0) == [2, 3, 1]


def test_equal_prefixes_go_by_admission() -> None:
    assert in_order([(waiting(2), 8), (waiting(1), 8)], now=1.0) == [1, 2]


def test_the_aged_go_by_arrival_whatever_their_prefix() -> None:
    items = [(waiting(3, arrival=9.0), 99), (waiting(2, arrival=1.0), 0), (waiting(1, arrival=2.0), 50)]
    assert in_order(items, now=10.0) == [2, 1, 3]


def test_priority_beats_age() -> None:
    assert in_order([(waiting(1), 99), (waiting(2, arrival=9.0, priority=1), 0)], now=10.0) == [2, 1]


def holder(order: int, state: SeqState) -> Seq:
    return make_seq(f"s{order}", [1], order=order, state=state)


def victim(requester: Seq, *others: Seq) -> Seq | None:
    return pick_victim([requester, *others], requester)


def test_the_youngest_gives_way() -> None:
    old, middle, young = (holder(order, SeqState.RUNNING) for order in (1, 2, 3))
    assert victim(old, middle, young) is young
    assert victim(middle, old, young) is young


def test_the_youngest_running_gives_way_to_its_elders() -> None:
    old, young = holder(1, SeqState.RUNNING), holder(2, SeqState.RUNNING)
    assert victim(young, old) is young


def test_a_younger_waiting_holder_gives_way_like_a_running_one() -> None:
    assert victim(old := holder(1, SeqState.RUNNING), young := holder(2, SeqState.WAITING)) is young
    assert victim(old) is None


def test_an_older_waiting_holder_gives_way_to_the_last_that_runs() -> None:
    lone, older = holder(5, SeqState.RUNNING), holder(1, SeqState.WAITING)
    assert victim(lone, older) is older
    assert victim(lone, older, holder(3, SeqState.RUNNING)) is lone


def test_pages_that_are_pushed_or_landed_on_are_never_taken() -> None:
    lone = holder(1, SeqState.RUNNING)
    assert victim(lone, holder(2, SeqState.HELD), holder(3, SeqState.WAITING_KV)) is None


def test_spare_pages_count_those_who_generate() -> None:
    running = [make_seq("a", [1]), make_seq("b", [1]), make_seq("c", [1], prefill_only=True)]
    assert spare_pages(running, 16) == 2
    assert spare_pages(running, 4) == 8
    assert spare_pages([], 4) == 0


@pytest.mark.parametrize(("field", "value"), [("max_batch_tokens", 0), ("max_running", 0), ("ageing_s", -1.0)])
def test_limits_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be at least"):
        EngineConfig(**{field: value})  # type: ignore[arg-type]


def test_no_more_run_than_there_are_tokens_in_a_batch() -> None:
    assert EngineConfig(max_batch_tokens=4, max_running=64).running_limit == 4


# Commit ---------------------------------------------------------------------------------------------------------------


def sampled(seq: Seq, token: int) -> FinishReason | None:
    output = commit_row(Row(seq, len(seq.tokens) - 1, 1, samples=True), Sampled(token))
    assert output is not None
    assert (output.tokens, output.finish) == ((token,), seq.finish)
    return output.finish


def test_a_stop_token_ends_and_is_named() -> None:
    seq = make_seq("a", [1, 2], max_tokens=3, eos_ids=frozenset({9}))
    assert sampled(seq, 8) is None
    assert sampled(seq, 9) is FinishReason.STOP
    assert (seq.stop_token, seq.tokens, seq.computed) == (9, [1, 2, 8, 9], 3)


def test_length_ends_without_stop_token() -> None:
    seq = make_seq("a", [1, 2], max_tokens=2, eos_ids=frozenset({9}))
    assert [sampled(seq, 3), sampled(seq, 4), seq.stop_token] == [None, FinishReason.LENGTH, None]


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert sampled(make_seq("a", [1], max_tokens=1, eos_ids=frozenset({9})), 9) is FinishReason.STOP


def test_no_stop_before_min_tokens() -> None:
    sampling = SamplingParams(max_tokens=9, min_tokens=2)
    seq = make_seq("a", [1], sampling=sampling, eos_ids=frozenset({9}))
    assert [sampled(seq, 9), sampled(seq, 9), sampled(seq, 9)] == [None, None, FinishReason.STOP]


def test_a_row_that_should_sample_and_could_not_ends_with_an_error() -> None:
    seq = make_seq("a", [1])
    output = commit_row(Row(seq, 0, 1, samples=True), Sampled(None))
    assert output is not None and output.tokens == () and output.finish is seq.finish is FinishReason.ERROR


def test_prompt_logprobs_are_collected_once() -> None:
    seq = make_seq("a", [1, 2, 3], sampling=SamplingParams(prompt_logprobs=0))
    first, second, third = (TokenLogprob(token, -1.0) for token in (2, 3, 4))
    assert commit_row(Row(seq, 0, 1, samples=False), Sampled(None, None, (first,))) is None
    commit_row(Row(seq, 1, 2, samples=True), Sampled(4, None, (second, third)))
    assert seq.prompt_logprobs == [None, first, second]
    commit_row(Row(seq, 0, 4, samples=True), Sampled(5, None, (first, second, third)))
    assert seq.prompt_logprobs == [None, first, second]


def test_prompts_take_what_the_bound_between_tokens_leaves() -> None:
    timing = StepTiming(base_ms=2.0, per_token_ms=0.1)
    assert prefill_budget(512, 4, timing, inter_token_ms=12.0) == 96
    assert prefill_budget(50, 4, timing, inter_token_ms=12.0) == 50
    assert prefill_budget(512, 4, timing, inter_token_ms=1.0) == LEAST_CHUNK
    assert prefill_budget(8, 4, timing, inter_token_ms=1.0) == 8
    for unbound in ((0, timing, 12.0), (4, None, 12.0), (4, timing, 0.0), (4, StepTiming(5.0, 0.0), 12.0)):
        assert prefill_budget(512, *unbound) == 512


class Failing:
    """A grammar whose library raises, in one place or the other."""

    active, stuck, finished, ends = True, False, False, frozenset[int]()

    def fill(self, mask: Any, row: int) -> None:
        raise RuntimeError("no mask")

    def accept(self, token: int) -> None:
        raise RuntimeError("no token")

    def force(self, limit: int) -> list[int]:
        raise AssertionError("never asked")


def test_a_grammar_that_fails_ends_its_own_sequence_alone() -> None:
    bound, free = make_seq("a", [1, 2], 9, constraint=Failing()), make_seq("b", [1, 2], 9)
    output = commit_row(Row(bound, 0, 2, True), Sampled(7))
    assert output is not None and (output.tokens, output.finish) == ((), FinishReason.ERROR)

    masks = MaskFiller(64).start([bound, free])
    assert masks is not None
    picked = sample(torch.zeros(2, 64), [bound, free], masks.result()).read()
    assert picked[0][0] is None and picked[1][0] is not None
    assert bound.constraint is not None and bound.constraint.stuck
