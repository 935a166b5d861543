"""Drafts by a model or a head, through real workers: no token changes, and what drafters remember travels with the KV.

A draft model that is the target itself is always right, as long as its KV is where it should be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import CheckpointError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import Drafted, make_drafters
from tandem.testing.pair import Answer, Pair, pair
from tandem.types import SamplingParams

SPEC = CheckpointSpec(layers=2, vocab=300, max_positions=512, seed=21)
PROMPTS = [[(13 * index * (row + 2) + 5 * row) % 290 + 6 for index in range(20 + 17 * row)] for row in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=70)
RETRACTING = 10
"""Times that the prompts are asked at most: a quick engine may end some of them before the last one comes."""
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    return make_drafters(tmp_path_factory.mktemp("drafters"), SPEC)


def settings_of(prefill: int, drafter: Path | None, **decode: Any) -> dict[str, Any]:
    shared = {
        "prefill": prefill,
        "dtype": "float32",
        "max_batch_tokens": 64,
        "draft_adaptive": False,
        "draft_tokens": 5,
    }
    return {**shared, "draft_model": None if drafter is None else str(drafter), "decode_settings": decode}


async def ask(workers: Pair, sampling: SamplingParams) -> list[list[int]]:
    """All prompts at once."""
    names = await asyncio.gather(*(workers.submit(prompt, sampling) for prompt in PROMPTS))
    return [only(await workers.answer(name)).tokens for name in names]


def only(answers: Sequence[Answer]) -> Answer:
    assert [answer.error for answer in answers] == [""]
    return answers[0]


def accepted_share(workers: Pair) -> float:
    speculation = workers.decode.engine.speculation
    assert speculation is not None
    assert speculation.drafted
    return speculation.accepted / speculation.drafted


@pytest.fixture(scope="module")
def expected(folders: Drafted) -> dict[SamplingParams, list[list[int]]]:
    async def without_drafts() -> dict[SamplingParams, list[list[int]]]:
        async with pair(folders.target, **settings_of(0, None)) as workers:
            return {sampling: await ask(workers, sampling) for sampling in (GREEDY, LONG, SAMPLED)}

    return asyncio.run(without_drafts())


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("drafter", ["head", "model", "twin"])
async def test_answers_are_those_without_drafts(
    drafter: str, prefill: int, folders: Drafted, expected: dict[SamplingParams, list[list[int]]]
) -> None:
    """Cold, from the prefix cache, and drawn."""
    async with pair(folders.target, **settings_of(prefill, folders.drafters[drafter])) as workers:
        for sampling in (GREEDY, GREEDY, SAMPLED):
            assert await ask(workers, sampling) == expected[sampling]
            assert accepted_share(workers) == 1.0 or drafter != "twin" or sampling is SAMPLED


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("drafter", ["head", "twin"])
async def test_retracted_sequences_go_on_as_they_would_have(
    drafter: str, prefill: int, folders: Drafted, expected: dict[SamplingParams, list[list[int]]]
) -> None:
    settings = settings_of(prefill, folders.drafters[drafter], pages=18, ageing_s=60.0)
    async with pair(folders.target, **settings) as workers:
        for _ in range(RETRACTING):
            assert await ask(workers, LONG) == expected[LONG]
            if workers.decode.engine.status().retractions:
                break
        assert workers.decode.engine.status().retractions > 0
        assert accepted_share(workers) == 1.0 or drafter != "twin"


async def test_the_drafters_kv_is_handed_over(folders: Drafted) -> None:
    """Were it not, the twin would guess without having seen the prompt."""
    async with pair(folders.target, **settings_of(1, folders.drafters["twin"])) as workers:
        answer = only(await workers.generate(PROMPTS[5], GREEDY))
        assert answer.usage is not None
        assert answer.usage.moved_tokens == len(PROMPTS[5]) - 1
        assert accepted_share(workers) == 1.0
        bytes_moved = sum(move.bytes for move in workers.decode.services.report().moves)
        assert bytes_moved == answer.usage.moved_tokens * workers.decode.info.layout.token_bytes
        target = make_bytes(SPEC)
        assert workers.decode.info.layout.token_bytes == 2 * target, "the twin has as many layers"


def make_bytes(spec: CheckpointSpec) -> int:
    """Of one token of the target alone, in float32."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * 4


async def test_a_drafter_at_one_end_alone_moves_nothing(folders: Drafted) -> None:
    """The hand-over is refused; the decode worker computes the prompt itself."""
    drafter = str(folders.drafters["model"])
    settings = {**settings_of(1, None), "decode_settings": {"draft_model": drafter}}
    async with pair(folders.target, **settings) as workers:
        answer = only(await workers.generate(PROMPTS[4], GREEDY))
        assert answer.usage is not None
        assert answer.usage.moved_tokens == 0
        assert workers.decode.info.layout.digest() != workers.prefill[0].info.layout.digest()
        assert workers.decode.info.model.fingerprint != workers.prefill[0].info.model.fingerprint


async def test_a_drafter_that_does_not_fit_stops_the_start(folders: Drafted, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", replace(SPEC, vocab=280))
    with pytest.raises(CheckpointError, match="has another vocabulary"):
        async with pair(folders.target, **settings_of(0, other)):
            pass
