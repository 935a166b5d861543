"""One request's queue: whatever arrives how often, the reader sees every token once and every choice's end once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.explain.story import Story
from router.open_request import Chain, OpenRequest
from tandem.kv import BLOCK_TOKENS, block_hashes
from tandem.testing.router import Deltas
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob, Usage

LENGTH = 12
SLICES = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, LENGTH), st.integers(0, LENGTH), st.integers(0, 2)), max_size=30
)


def make(choices: int = 2, max_buffered: int = 10_000) -> OpenRequest:
    request = GenerateRequest("r", "m", (1,), SamplingParams(), choices=choices, attempt=1)
    record = OpenRequest(request, max_buffered, Chain(b"root", ()), Story.of(request, 0.0, 0.0), lambda: 0.0)
    record.answered = True
    return record


async def drain(record: OpenRequest) -> list[Delta]:
    return [delta async for delta in Deltas(record.follow)]


def delta(choice: int, start: int, end: int, attempt: int = 1) -> Delta:
    tokens = tuple(100 * choice + index for index in range(start, end))
    logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens)
    finish = FinishReason.LENGTH if end == LENGTH else None
    return Delta("r", attempt, choice, start, tokens, logprobs, finish=finish)


@settings(max_examples=100)
@given(SLICES)
def test_any_order_of_repeats_gives_each_token_once(slices: list[tuple[int, int, int, int]]) -> None:
    record = make()
    reached = [0, 0]
    for choice, low, high, attempt in slices:
        start, end = min(low, high), max(low, high)
        problem = record.push(delta(choice, start, end, attempt))
        if attempt == 1 and reached[choice] < LENGTH:
            assert bool(problem) == (start > reached[choice])
            if not problem:
                reached[choice] = max(reached[choice], end)
        else:
            assert not problem
    record.end(FinishReason.CANCELLED)
    record.end(FinishReason.ERROR)
    deltas = asyncio.run(drain(record))
    for choice in (0, 1):
        mine = [d for d in deltas if d.choice == choice]
        tokens = [token for d in mine for token in d.tokens]
        assert tokens == [100 * choice + index for index in range(reached[choice])]
        assert [entry.token for d in mine for entry in d.logprobs] == tokens
        ends = [d.finish for d in mine if d.finish is not None]
        assert ends == [FinishReason.LENGTH if reached[choice] == LENGTH else FinishReason.CANCELLED]


def test_prompt_logprobs_come_once_even_without_tokens() -> None:
    record = make(choices=1)
    first = Delta("r", 1, 0, 0, (), (), (None, TokenLogprob(1, -0.5)))
    assert record.push(first) == ""
    assert record.push(delta(0, 0, LENGTH)) == ""
    deltas = asyncio.run(drain(record))
    assert [bool(d.prompt_logprobs) for d in deltas] == [True, False]


def test_the_queue_is_bounded_by_tokens_and_one_large_delta_passes() -> None:
    record = make(choices=1, max_buffered=4)
    assert record.push(delta(0, 0, 9)) == ""
    assert "more than 4 tokens wait" in record.push(delta(0, 9, 10))


def test_a_message_with_many_tokens_of_each_choice_cuts_nobody() -> None:
    """A worker merges what it made while the router stood still."""
    record = make(choices=2, max_buffered=4)
    assert [record.push(delta(choice, 0, 4)) for choice in (0, 1)] == ["", ""]
    assert "more than 8 tokens wait" in record.push(delta(0, 4, 5))


def test_tokens_alone_wait_together_however_many() -> None:
    """Who asked for several prompts at once reads none before all of them are taken."""
    record = make(choices=2, max_buffered=4)
    usage = Usage(1, 1, 0)
    for choice in (0, 1):
        assert record.push(Delta("r", 1, choice, 0, (0,), usage=usage)) == ""
    for index in range(1, 100):
        for choice in (0, 1):
            assert record.push_tokens(1, choice, index, [index]) == ""
    assert record.push(Delta("r", 1, 0, 100, (100,), finish=FinishReason.LENGTH)) == ""
    record.end(FinishReason.CANCELLED)
    deltas = asyncio.run(drain(record))
    assert [(d.first_index, d.tokens) for d in deltas if d.choice] == [(0, (0,)), (1, tuple(range(1, 100))), (100, ())]
    assert [(d.first_index, d.tokens) for d in deltas if not d.choice] == [
        (0, (0,)), (1, tuple(range(1, 100))), (100, (100,)),
    ]  # fmt: skip


def test_a_new_attempt_starts_from_nothing() -> None:
    record = make(choices=1)
    record.push(delta(0, 0, 5))
    record.next_attempt()
    assert record.push(delta(0, 0, 5)) == ""
    assert record.push(delta(0, 0, LENGTH, attempt=2)) == ""
    assert [d.first_index for d in asyncio.run(drain(record))] == [0]


class Fragile:
    """A reader that cannot take a certain token."""

    def __init__(self, bad: int) -> None:
        self.bad = bad
        self.seen: list[int] = []
        self.deltas = 0

    def tokens(self, choice: int, first_index: int, tokens: Sequence[int]) -> None:
        self.delta(Delta("", 0, choice, first_index, tuple(tokens)))

    def delta(self, delta: Delta) -> None:
        if self.bad in delta.tokens:
            raise RuntimeError("cannot read this")
        self.seen += delta.tokens
        self.deltas += 1


async def test_plain_tokens_are_told_at_once_and_a_failing_reader_hurts_only_itself() -> None:
    record, reader = make(choices=1), Fragile(bad=7)
    assert record.push_tokens(1, 0, 0, [1]) == ""
    following = asyncio.ensure_future(record.follow(reader))
    await asyncio.sleep(0)
    assert reader.seen == [1]
    assert record.push_tokens(1, 0, 1, [2]) == record.push_tokens(1, 0, 1, [2, 3]) == ""
    assert record.push_tokens(0, 0, 3, [4]) == record.push_tokens(1, 9, 3, [4]) == "", "another attempt, no such choice"
    assert reader.seen == [1, 2, 3]
    assert record.push_tokens(1, 0, 3, []) == "" and reader.deltas == 3, "a worker that was asked to go on, and has not"
    assert "tokens 3 to 4 were lost" in record.push_tokens(1, 0, 5, [4])
    assert record.push_tokens(1, 0, 3, [7]) == ""
    with pytest.raises(RuntimeError, match="cannot read"):
        await following
    assert record.push_tokens(1, 0, 4, [8]) == ""
    assert reader.seen == [1, 2, 3]
    assert record.behind_blocks() == [(1, 1, 2, 3, 7)]


def test_the_end_of_a_request_looks_behind_the_prompts_whole_blocks_only() -> None:
    prompt = tuple(range(2 * BLOCK_TOKENS + 3))
    for length, rest in ((len(prompt), prompt[-3:]), (2 * BLOCK_TOKENS, ())):
        request = GenerateRequest("r", "m", prompt[:length], SamplingParams(), choices=2)
        chain = Chain(b"root", tuple(block_hashes(b"root", prompt[:length])))
        record = OpenRequest(request, 8, chain, Story.of(request, 0.0, 0.0), lambda: 0.0)
        record.push(Delta("r", 0, 1, 0, (7, 8)))
        assert record.behind_blocks() == [rest[:-1], (*rest, 7)]
