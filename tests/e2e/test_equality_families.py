"""Greedy answers of every family are those of `transformers` in float32, with and without a hand-over.

The ways an answer may be computed are crossed in `test_equality`, on two families; here each family takes those that
windows and layer groups could break: hand-over, chunks, cached and evicted prefixes, company, small pages.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.testing.checkpoints import make_checkpoint
from tandem.testing.families import VARIANTS, WINDOW
from tandem.testing.pair import Answer, Pair, pair
from tandem.testing.reference import Reference
from tandem.types import FinishReason, SamplingParams

FAMILIES = (
    "qwen2-window",
    "qwen3",
    "mistral",
    "ministral",
    "gemma2",
    "gemma3",
    "phi3-window",
    "olmo2",
    "granite",
    "smollm3",
    "smollm3-window",
)
VOCAB = 300
LENGTHS = (1, 17, WINDOW, WINDOW + 1, 64, 65, 100, 150, *range(2, 149, 7))[:29]
SHARED = 70
"""Tokens that three more prompts have in common, at the start."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)
WINDOWS_ALONE = ("mistral", "phi3-window")
"""Families without full attention: the cache remembers a sequence by the pages of its last window."""
WAYS: dict[str, dict[str, Any]] = {
    "aggregated": {"prefill": 0, "page_size": 16, "max_batch_tokens": 40, "kernels": "torch"},
    "scarce": {"prefill": 0, "page_size": 4, "max_batch_tokens": 40, "pages": 100},
    "disaggregated": {"prefill": 1, "page_size": 4, "max_batch_tokens": 40, "decode_settings": {"span_tokens": 32}},
}


def prompts() -> list[list[int]]:
    source = random.Random(3)

    def draw(count: int) -> list[int]:
        return [source.randrange(6, VOCAB) for _ in range(count)]

    shared = draw(SHARED)
    return [draw(length) for length in LENGTHS] + [shared + draw(length) for length in (1, 20, 40)]


async def ask(workers: Pair, asked: list[list[int]]) -> list[Answer]:
    names = [await workers.submit(prompt, GREEDY) for prompt in asked]
    return [(await workers.answer(name))[0] for name in names]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
async def test_greedy_answers_equal_the_reference(way: str, family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, replace(VARIANTS[family], seed=21))
    reference, asked = Reference.load(path), prompts()
    settings = dict(WAYS[way])
    if way == "scarce" and family in WINDOWS_ALONE:
        settings["pages"] = 40
    async with pair(path, dtype="float32", **settings) as workers:
        cold = await ask(workers, asked)
        warm = await ask(workers, [[*prompt, *answer.tokens, 7] for prompt, answer in zip(asked, cold, strict=True)])
    turns = [[*prompt, *answer.tokens, 7] for prompt, answer in zip(asked, cold, strict=True)]
    near_ties = 0
    for prompt, answer in zip(asked + turns, cold + warm, strict=True):
        assert (answer.finish, answer.error, len(answer.tokens)) == (FinishReason.LENGTH, "", GREEDY.max_tokens)
        verdict = reference.judge(prompt, answer.tokens, answer.logprobs)
        assert verdict.agrees
        near_ties += verdict.near_ties
    assert near_ties < 0.02 * GREEDY.max_tokens * len(cold + warm), "the reference must nearly always have an opinion"
    usages = [answer.usage for answer in cold + warm if answer.usage]
    assert sum(usage.moved_tokens for usage in usages) > (400 if way == "disaggregated" else -1)
    cached = sum(answer.usage.cached_tokens for answer in warm if answer.usage)
    if way == "scarce":
        assert cached < sum(map(len, asked)), "some of the first turns must have been evicted"
    else:
        assert cached > 400
