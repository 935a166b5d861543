"""Sampled answers depend on seed and choice alone: not on who prefilled, what was cached, batch or retraction."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.testing.pair import pair
from tandem.testing.reference import TOLERANCE
from tandem.types import SamplingParams

TOKENS = 24
PENALISED = SamplingParams(
    temperature=0.9,
    top_p=0.95,
    top_k=100,
    frequency_penalty=0.6,
    presence_penalty=-0.2,
    repetition_penalty=1.2,
    seed=1234,
    max_tokens=TOKENS,
    ignore_eos=True,
)
WAYS: dict[str, dict[str, Any]] = {
    "handed-over": {"prefill": 1},
    "chunked-and-handed-over": {"prefill": 1, "max_batch_tokens": 24},
    "overlapping": {"prefill": 1, "overlap": "on"},
    "overlapping-and-retracted": {"prefill": 0, "overlap": "on", "decode_settings": {"pages": 16, "ageing_s": 60.0}},
    "by torch's kernels": {"prefill": 0, "kernels": "torch"},
    "retracted": {"prefill": 0, "decode_settings": {"pages": 16, "ageing_s": 60.0}},
    "handed-over-and-retracted": {"prefill": 1, "decode_settings": {"pages": 16, "ageing_s": 60.0}},
    "handed-over-and-drafted": {"prefill": 1, "draft_tokens": 3, "draft_adaptive": False},
    "drafted-and-retracted": {
        "prefill": 0, "draft_tokens": 3, "draft_adaptive": False,
        "decode_settings": {"pages": 16, "ageing_s": 60.0},
    },
}  # fmt: skip


async def _sample(subject: Any, batch: int, **settings: Any) -> tuple[list[list[int]], int]:
    """Tokens of every prompt, each with its own seed, and how often sequences were retracted."""
    tokens: list[list[int]] = []
    async with pair(subject.path, dtype="float32", **settings) as workers:
        for first in range(0, len(subject.prompts), batch):
            names = [
                await workers.submit(prompt, SamplingParams(seed=seed, max_tokens=TOKENS, ignore_eos=True))
                for seed, prompt in list(enumerate(subject.prompts))[first : first + batch]
            ]
            tokens += [(await workers.answer(name))[0].tokens for name in names]
        return tokens, workers.decode.engine.status().retractions


@pytest.fixture(scope="module")
def plain() -> dict[str, list[list[int]]]:
    """Family -> what one request at a time gives, prefilled by the decode worker."""
    return {}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("way", WAYS)
async def test_the_way_changes_no_sampled_token(
    way: str, family: str, subjects: dict[str, Any], plain: dict[str, list[list[int]]]
) -> None:
    if family not in plain:
        plain[family], _ = await _sample(subjects[family], 1, prefill=0)
        assert len({tuple(tokens) for tokens in plain[family]}) == len(plain[family])
    settings = WAYS[way]
    if "drafted" in way:
        settings = {**settings, "draft_model": str(subjects[family].head)}
    # On a busy machine requests may come in so far apart that the first have ended before pages run out.
    for _ in range(5 if "retracted" in way else 1):
        tokens, retractions = await _sample(subjects[family], 16, **settings)
        assert tokens == plain[family]
        if retractions:
            break
    assert bool(retractions) == ("retracted" in way)


async def test_choices_differ_and_each_is_repeatable(subjects: dict[str, Any]) -> None:
    subject = subjects["llama"]
    prompt = subject.prompts[0]
    async with pair(subject.path, dtype="float32") as workers:
        four = [answer.tokens for answer in await workers.generate(prompt, PENALISED, choices=4)]
        again = [answer.tokens for answer in await workers.generate(prompt, PENALISED, choices=4, hand_over=False)]
        (one,) = await workers.generate(prompt, PENALISED, hand_over=False)
        (other,) = await workers.generate(prompt, SamplingParams(seed=5, max_tokens=TOKENS, ignore_eos=True))
    assert len({tuple(tokens) for tokens in four}) == 4
    assert again == four
    assert one.tokens == four[0]
    assert other.tokens != four[0]


async def test_choices_of_a_greedy_request_are_equal_and_use_one_prompt(subjects: dict[str, Any]) -> None:
    subject = subjects["qwen2"]
    prompt = max(subject.prompts, key=len)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    async with pair(subject.path, dtype="float32") as workers:
        answers = await workers.generate(prompt, sampling, choices=3)
    for answer in answers:
        assert subject.reference.judge(prompt, answer.tokens, answer.logprobs).agrees
        assert answer.usage is not None
        assert answer.usage.moved_tokens == len(prompt) - 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("budget", [512, 24])
async def test_log_probabilities_of_prompts_equal_the_reference(
    budget: int, family: str, subjects: dict[str, Any]
) -> None:
    """Also where the prompt is cached, and in chunks: every position is computed then."""
    subject = subjects[family]
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=3)
    async with pair(subject.path, dtype="float32", max_batch_tokens=budget) as workers:
        for prompt in subject.prompts[:12] * 2:
            (answer,) = await workers.generate(prompt, sampling)
            assert subject.reference.judge(prompt, answer.tokens).agrees
            assert subject.reference.judge_prompt(prompt, answer.prompt_logprobs) <= TOLERANCE
