"""Requests that go on here after the worker that began them was lost: as if nothing had happened."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decode_worker.requests import make_request
from tandem.cluster import new_id
from tandem.engine.sequence import NO_DRAFT, Draft
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.pair import Answer, Pair, pair
from tandem.types import FinishReason, GenerateRequest, SamplingParams, TokenIds

PROMPT = tuple((7 * index) % 290 for index in range(200))
WHOLE = SamplingParams(
    temperature=0.9, top_p=0.95, seed=11, frequency_penalty=0.7, repetition_penalty=1.2, min_tokens=12, max_tokens=24,
    logprobs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=2, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=2048)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


async def resume(
    workers: Pair, sampling: SamplingParams, made: tuple[TokenIds, ...], ended: tuple[int, ...] = ()
) -> list[Answer]:
    request = GenerateRequest(
        new_id(), "test", PROMPT, sampling, choices=len(made), attempt=1, generated=made, ended=ended
    )
    await workers.send(request)
    return await workers.answer(request.request_id)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("hand_over", [0, 1])
async def test_it_goes_on_where_it_stood(model: Path, page_size: int, hand_over: int) -> None:
    """Seeded places, penalties, `min_tokens`, log-probabilities and the limit all count what was made elsewhere."""
    async with pair(model, prefill=hand_over, page_size=page_size) as workers:
        (whole,) = await workers.generate(PROMPT, WHOLE)
        for cut in (0, 1, 7, 23):
            (rest,) = await resume(workers, WHOLE, (tuple(whole.tokens[:cut]),))
            assert (rest.tokens, rest.finish) == (whole.tokens, whole.finish)
            assert [each.token for each in rest.logprobs] == whole.tokens[cut:]
            assert [each.logprob for each in rest.logprobs] == pytest.approx(
                [each.logprob for each in whole.logprobs[cut:]], abs=1e-4
            )
            assert rest.usage is not None
            assert rest.usage.completion_tokens == len(whole.tokens)
            assert rest.usage.cached_tokens <= rest.usage.prompt_tokens


async def test_choices_go_on_each_from_its_own_place_and_ended_ones_stay_ended(model: Path) -> None:
    async with pair(model) as workers:
        whole = await workers.generate(PROMPT, WHOLE, choices=4)
        made = tuple(tuple(answer.tokens[:cut]) for answer, cut in zip(whole, (24, 3, 0, 9), strict=True))
        rest = await resume(workers, WHOLE, made, ended=(0,))
        assert [answer.tokens for answer in rest[1:]] == [answer.tokens for answer in whole[1:]]
        assert rest[0].tokens == list(made[0]), "an ended choice is told nothing more"


async def test_a_prompts_scores_come_with_the_first_token_or_not_at_all(model: Path) -> None:
    scoring = replace(WHOLE, prompt_logprobs=0)
    async with pair(model) as workers:
        (whole,) = await workers.generate(PROMPT, scoring)
        (fresh,) = await resume(workers, scoring, ((),))
        (later,) = await resume(workers, scoring, (tuple(whole.tokens[:5]),))
        assert len(fresh.prompt_logprobs) == len(PROMPT)
        assert later.prompt_logprobs == ()
        assert fresh.tokens == later.tokens == whole.tokens


async def test_a_resumed_stream_that_breaks_does_not_repeat_what_others_made(model: Path) -> None:
    async with pair(model) as workers:
        (whole,) = await workers.generate(PROMPT, WHOLE)
        request = GenerateRequest(new_id(), "test", PROMPT, WHOLE, attempt=1, generated=(tuple(whole.tokens[:6]),))
        await workers.send(request)
        await workers.disconnect()
        await workers.connect()
        (rest,) = await workers.answer(request.request_id)
        assert rest.tokens == whole.tokens


class Recorder:
    """A constraint that only listens."""

    active, stuck, finished = True, False, False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def fill(self, mask: object, row: int) -> None: ...

    def accept(self, token: int) -> None:
        self.taken.append(token)

    def force(self, limit: int) -> list[int]:
        return []

    def prune(self, draft: Draft) -> Draft:
        return NO_DRAFT

    def fill_draft(self, draft: Draft, mask: object, row: int) -> None: ...


async def test_a_grammar_knows_what_was_made() -> None:
    asked = GenerateRequest(new_id(), "test", PROMPT, WHOLE, choices=2, attempt=1, generated=((5, 6), (7,)))
    made: list[Recorder] = []

    def constrain() -> Any:
        made.append(Recorder())
        return made[-1]

    make_request(asked, "router", b"root", frozenset(), 0, 0.0, constrain)
    assert [constraint.taken for constraint in made] == [[5, 6], [7]]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"generated": ((1,),), "choices": 2}, "generated has 1 choices; n is 2"),
        ({"generated": (tuple(range(24)),)}, "generated has 24 tokens; max_tokens is 24"),
        ({"ended": (1,)}, r"ended names choices \(1,\); n is 1"),
        ({"ended": (0,)}, "ended names every choice"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GenerateRequest(new_id(), "test", PROMPT, WHOLE, **fields)  # type: ignore[arg-type]


async def test_the_other_end_can_be_lost_too(model: Path) -> None:
    """A prefill worker that dies while it computes what a resumed request lacks costs nothing but time."""
    async with pair(model, max_batch_tokens=16) as workers:
        (whole,) = await workers.generate(PROMPT, WHOLE)
        longer = replace(WHOLE, seed=12)
        (other,) = await workers.generate((*PROMPT[::-1],), longer)
        request = GenerateRequest(
            new_id(), "test", (*PROMPT[::-1],), longer, attempt=1, generated=(tuple(other.tokens[:4]),), salt="cold"
        )
        await workers.send(request)
        await asyncio.sleep(0)
        await workers.stop(workers.prefill[0])
        (rest,) = await workers.answer(request.request_id)
        assert (rest.tokens, rest.finish) == (other.tokens, FinishReason.LENGTH)
        assert whole.tokens != other.tokens
