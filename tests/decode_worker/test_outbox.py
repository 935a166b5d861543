"""One router's tokens: merged for a slow reader, rewound for one that comes back, never to two readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.outbox import Outbox, ResumeAt
from decode_worker.requests import Choice, Request, make_request
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob


def make_record(choices: int = 1, **sampling: int) -> Request:
    request = GenerateRequest("a" * 32, "m", (1, 2, 3), SamplingParams(**sampling), choices=choices)  # type: ignore[arg-type]
    return make_request(request, "router", b"root", frozenset({9}), 0, 0.0)


def grow(choice: Choice, *tokens: int, finish: FinishReason | None = None) -> None:
    choice.tokens += tokens
    choice.logprobs += [TokenLogprob(token, -1.0) for token in tokens]
    choice.finish = finish


async def read(messages: AsyncIterator[list[Delta]]) -> list[Delta]:
    async with asyncio.timeout(5):
        return await anext(messages)


async def test_a_step_s_tokens_go_out_as_one_message() -> None:
    outbox, record = Outbox("router", 100.0), make_record(2)
    messages = outbox.messages(outbox.attach())
    for choice, token in zip(record.choices, (7, 8), strict=True):
        grow(choice, token)
        outbox.mark(choice)
    outbox.flush()
    deltas = await read(messages)
    assert [(delta.choice, delta.first_index, delta.tokens) for delta in deltas] == [(0, 0, (7,)), (1, 0, (8,))]
    assert [len(delta.logprobs) for delta in deltas] == [1, 1]
    assert [delta.usage and delta.usage.completion_tokens for delta in deltas] == [1, 1]
    grow(record.choices[0], 9)
    outbox.mark(record.choices[0])
    outbox.flush()
    assert [delta.usage for delta in await read(messages)] == [None]


async def test_prompts_that_are_scored_together_are_spread_over_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_worker.outbox.MESSAGE_SCORES", 5)
    outbox, records = Outbox("router", 100.0), [make_record() for _ in range(5)]
    messages = outbox.messages(outbox.attach())
    for record in records:
        record.choices[0].prompt_logprobs = (None, TokenLogprob(2, -1.0), TokenLogprob(3, -1.0))
        record.choices[0].finish = FinishReason.LENGTH
        outbox.mark(record.choices[0])
    outbox.flush()
    assert [len(await read(messages)) for _ in range(3)] == [2, 2, 1]


async def test_what_a_slow_reader_missed_is_merged() -> None:
    outbox, record = Outbox("router", 100.0), make_record()
    choice, messages = record.choices[0], outbox.messages(outbox.attach())
    for token in range(100):
        grow(choice, token, finish=FinishReason.LENGTH if token == 99 else None)
        outbox.mark(choice)
        outbox.flush()
    (delta,) = await read(messages)
    assert (delta.first_index, delta.tokens, delta.finish) == (0, tuple(range(100)), FinishReason.LENGTH)
    assert delta.usage is not None
    assert (delta.usage.prompt_tokens, delta.usage.completion_tokens) == (3, 100)


async def test_an_end_is_sent_once() -> None:
    outbox, record = Outbox("router", 0.01), make_record()
    choice, messages = record.choices[0], outbox.messages(outbox.attach())
    grow(choice, 1, finish=FinishReason.STOP)
    outbox.mark(choice)
    outbox.flush()
    assert len(await read(messages)) == 1
    outbox.mark(choice)
    outbox.flush()
    assert await read(messages) == []


async def test_silence_is_filled_with_heartbeats() -> None:
    outbox = Outbox("router", 0.01)
    messages = outbox.messages(outbox.attach())
    assert [await read(messages) for _ in range(3)] == [[], [], []]


async def test_a_new_reader_gets_what_was_rewound_and_the_former_ends() -> None:
    outbox, record = Outbox("router", 100.0), make_record()
    choice = record.choices[0]
    former = outbox.attach()
    messages = outbox.messages(former)
    grow(choice, *range(10))
    outbox.mark(choice)
    outbox.flush()
    await read(messages)  # lost on the way
    ended = asyncio.create_task(anext(messages, None))
    await asyncio.sleep(0)
    newer = outbox.attach()
    choice.rewind(4)
    outbox.mark(choice)
    outbox.flush()
    assert await ended is None
    outbox.detach(former)
    assert outbox.idle_since is None
    (delta,) = await read(outbox.messages(newer))
    assert (delta.first_index, delta.tokens) == (4, tuple(range(4, 10)))
    outbox.detach(newer)
    assert outbox.idle_since is not None


async def test_a_reader_that_missed_nothing_is_told_nothing() -> None:
    outbox, record = Outbox("router", 0.01), make_record()
    choice, messages = record.choices[0], outbox.messages(outbox.attach())
    grow(choice, 1, 2)
    outbox.mark(choice)
    outbox.flush()
    await read(messages)
    messages = outbox.messages(outbox.attach())
    choice.rewind(2)
    outbox.mark(choice)
    assert await read(messages) == [], "a heartbeat"
    grow(choice, 3)
    outbox.mark(choice)
    outbox.flush()
    assert [(delta.first_index, delta.tokens) for delta in await read(messages)] == [(2, (3,))]


async def test_the_end_is_sent_again_to_a_router_that_missed_it() -> None:
    outbox, record = Outbox("router", 100.0), make_record()
    choice = record.choices[0]
    grow(choice, 1, 2, finish=FinishReason.LENGTH)
    outbox.mark(choice)
    messages = outbox.messages(outbox.attach())
    await read(messages)
    choice.rewind(2)
    outbox.mark(choice)
    (delta,) = await read(outbox.messages(outbox.attach()))
    assert (delta.first_index, delta.tokens, delta.finish) == (2, (), FinishReason.LENGTH)


async def test_a_request_that_is_not_known_ends_with_an_error() -> None:
    outbox = Outbox("router", 100.0)
    reader = outbox.attach()
    outbox.lost(ResumeAt("b" * 32, 1, 2, 17))
    (delta,) = await read(outbox.messages(reader))
    assert (delta.request_id, delta.attempt, delta.choice, delta.first_index) == ("b" * 32, 1, 2, 17)
    assert (delta.finish, delta.error) == (FinishReason.ERROR, "the worker no longer knows this request")


async def test_prompt_log_probabilities_come_once_and_again_after_a_full_rewind() -> None:
    outbox, record = Outbox("router", 100.0), make_record()
    choice, messages = record.choices[0], outbox.messages(outbox.attach())
    choice.prompt_logprobs = (None, TokenLogprob(2, -0.5))
    seen = []
    for token in (1, 2):
        grow(choice, token)
        outbox.mark(choice)
        outbox.flush()
        seen.append((await read(messages))[0].prompt_logprobs)
    choice.rewind(0)
    outbox.mark(choice)
    seen.append((await read(outbox.messages(outbox.attach())))[0].prompt_logprobs)
    assert seen == [choice.prompt_logprobs, (), choice.prompt_logprobs]


@given(st.lists(st.sampled_from(["token", "flush", "read", "lose", "reconnect"]), max_size=40))
def test_a_router_that_resumes_sees_every_token_once(actions: list[str]) -> None:
    async def play() -> None:
        outbox, choice = Outbox("router", 0.0), make_record().choices[0]
        messages = outbox.messages(outbox.attach())
        received: list[int] = []
        for action in [*actions, "reconnect", "read"]:
            if action == "token":
                grow(choice, len(choice.tokens))
                outbox.mark(choice)
            elif action == "flush":
                outbox.flush()
            elif action == "reconnect":
                messages = outbox.messages(outbox.attach())
                choice.rewind(len(received))
                outbox.mark(choice)
            else:
                for delta in await read(messages):
                    if action == "lose":  # with the connection: the router resumes behind what it has
                        messages = outbox.messages(outbox.attach())
                        choice.rewind(len(received))
                        outbox.mark(choice)
                        break
                    assert delta.first_index == len(received)
                    received += delta.tokens
        assert received == choice.tokens == list(range(len(choice.tokens)))

    asyncio.run(play())
