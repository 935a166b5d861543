"""The record of a request: its sequences, its end, its counts."""

from __future__ import annotations

from dataclasses import replace

from decode_worker.requests import make_request
from tandem.types import FinishReason, GenerateRequest, SamplingParams


def request(**sampling: object) -> GenerateRequest:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return GenerateRequest("a" * 32, "m", (1, 2, 3), params, choices=3, attempt=2, priority=5)


def test_every_choice_has_its_own_sequence() -> None:
    record = make_request(request(prompt_logprobs=2, stop_token_ids=(8,)), "r", b"root", frozenset({9}), 40, 1.5)
    seqs = [choice.seq for choice in record.choices]
    assert [seq.seq_id for seq in seqs] == [f"{'a' * 32}.2.{index}" for index in range(3)]
    assert [seq.choice for seq in seqs] == [0, 1, 2]
    assert [seq.sampling.prompt_logprobs for seq in seqs] == [2, None, None]
    assert {(seq.prompt_len, seq.root, seq.priority, seq.arrival, seq.eos_ids) for seq in seqs} == {
        (3, b"root", 5, 1.5, frozenset({8, 9}))
    }
    assert len({id(seq.tokens) for seq in seqs}) == 3


def test_ignoring_the_end_of_sequence_keeps_the_request_s_own_stops() -> None:
    record = make_request(request(ignore_eos=True, stop_token_ids=(8,)), "r", b"root", frozenset({9}), 0, 0.0)
    assert record.choices[0].seq.eos_ids == frozenset({8})


def test_a_request_ends_with_its_last_choice() -> None:
    record = make_request(request(), "r", b"root", frozenset(), 0, 0.0)
    for choice in record.choices:
        assert not record.finished
        assert choice in list(record.open_choices())
        choice.finish = FinishReason.STOP
    assert record.finished
    assert list(record.open_choices()) == []


def test_usage_names_the_longest_cache_and_what_was_moved() -> None:
    asked = replace(request(), prompt=tuple(range(100)))
    record = make_request(asked, "r", b"root", frozenset(), 0, 0.0)
    record.decode_cached, record.sender_cached, record.moved_tokens = 16, 64, 48
    record.choices[1].tokens = [4, 5]
    usage = record.choices[1].usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (100, 2, 64)
    assert (usage.decode_cached_tokens, usage.moved_tokens) == (16, 48)


def test_usage_comes_first_and_last() -> None:
    """First for a router that ends the choice at a stop string: it hears of no last one."""
    choice = make_request(request(), "r", b"root", frozenset(), 0, 0.0).choices[0]
    said = []
    for token in range(3):
        choice.tokens.append(token)
        choice.finish = FinishReason.LENGTH if token == 2 else None
        said.append(choice.delta().usage)
        choice.mark_sent()
    assert [usage and usage.completion_tokens for usage in said] == [1, None, 3]
