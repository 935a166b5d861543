"""Layers with a window answer like `transformers`, whatever was given up, cached, moved or taken back on the way.

Prompts reach several windows and blocks beyond what is kept, so that a page too few, or one that holds only a part of
its tokens, turns up.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.scheduler import Plan
from tandem.testing.checkpoints import make_checkpoint
from tandem.testing.families import VARIANTS, WINDOW
from tandem.testing.pair import Answer, Pair, pair
from tandem.testing.reference import Reference
from tandem.types import SamplingParams

FAMILIES = ("mistral", "gemma2", "gemma3")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
LENGTHS = (130, 193, 255)
WAYS: dict[str, dict[str, Any]] = {
    "page1": {"prefill": 1, "page_size": 1, "max_batch_tokens": 48, "decode_settings": {"span_tokens": 20}},
    "page16": {"prefill": 1, "page_size": 16, "max_batch_tokens": 1024, "decode_settings": {"span_tokens": 32}},
    "page64": {"prefill": 1, "page_size": 64, "max_batch_tokens": 100, "decode_settings": {"span_tokens": 64}},
    "retracted": {"prefill": 1, "page_size": 16, "max_batch_tokens": 48},
    "alone": {"prefill": 0, "page_size": 4, "max_batch_tokens": 33},
}


def retract_once(workers: Pair) -> None:
    """Takes every sequence's pages at its third output token."""
    scheduler = workers.decode.engine.scheduler
    schedule = scheduler.schedule

    def retracting(*arguments: Any, **more: Any) -> Plan:
        forced = Plan(0)
        for seq in [seq for seq in scheduler.running if seq.output_len == 3 and not seq.retractions]:
            scheduler.retract(seq, forced)
        plan = schedule(*arguments, **more)
        plan.retracted += forced.retracted
        return plan

    scheduler.schedule = retracting  # type: ignore[method-assign]


async def ask(workers: Pair, prompts: list[list[int]]) -> list[Answer]:
    names = [await workers.submit(prompt, GREEDY) for prompt in prompts]
    return [(await workers.answer(name))[0] for name in names]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
async def test_windows_are_given_up_cached_and_moved_without_a_trace(way: str, family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, replace(VARIANTS[family], seed=5))
    source, reference = random.Random(9), Reference.load(path)
    prompts = [[source.randrange(6, 300) for _ in range(length)] for length in LENGTHS]
    asked: list[list[int]] = []
    answers: list[Answer] = []
    async with pair(path, dtype="float32", **WAYS[way]) as workers:
        if way == "retracted":
            retract_once(workers)
        for turn in range(3):
            if turn == 2:
                # The windows of the second turn's ends are gone, the tokens are not.
                memory = workers.decode.engine.memory
                memory.cache.evict(memory.windowed[0], 1 << 20)
            asked += prompts
            answers += await ask(workers, prompts)
            prompts = [[*prompt, *answer.tokens, 9, 8] for prompt, answer in zip(prompts, answers[-3:], strict=True)]
        retractions = workers.decode.engine.status().retractions
    assert retractions >= (9 if way == "retracted" else 0)
    for prompt, answer in zip(asked, answers, strict=True):
        assert (len(answer.tokens), answer.error) == (GREEDY.max_tokens, "")
        assert reference.judge(prompt, answer.tokens, answer.logprobs).agrees
    check_usage(way, family, answers)


def check_usage(way: str, family: str, answers: list[Answer]) -> None:
    """The first turn moves what windows see, the second finds the first, the third must do without windows."""
    usages = [answer.usage for answer in answers if answer.usage]
    page = int(WAYS[way]["page_size"])
    for length, first, second, third in zip(LENGTHS, usages[:3], usages[3:6], usages[6:], strict=True):
        moved = length - 1
        if family == "mistral":
            moved -= max((length - 1) // 64 * 64 - WINDOW + 1, 0) // 64 * 64
        assert first.moved_tokens == (0 if way == "alone" else moved)
        assert second.decode_cached_tokens == (length + 8 - 1) // page * page
        assert third.decode_cached_tokens == 0
