"""Greedy answers are those of `transformers` in float32, whatever way they are computed.

Every axis alone, and every pair of values of two axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from tandem.cluster import StepTiming
from tandem.engine.engine import Engine
from tandem.engine.scheduler import Plan
from tandem.testing.pair import Answer, Pair, pair
from tandem.types import FinishReason, SamplingParams

TOKENS = 8
LONG = 24
"""Output tokens where pages must run out: admission keeps room for 16 more of each sequence that runs."""
CAPACITY = 256
"""Tokens that fit into the pages where they must run out: less than 16 prompts need."""
SPAN = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination. The first value of each axis is the plain one."""

    form: str = "aggregated"
    page: int = 16
    cache: str = "cold"
    prompt: str = "whole"
    batch: int = 1
    pages: str = "ample"
    drafts: str = "none"

    def __str__(self) -> str:
        plain = f"{self.form}-page{self.page}-{self.cache}-{self.prompt}-batch{self.batch}-{self.pages}"
        return plain if self.drafts == "none" else f"{plain}-{self.drafts}"

    def pairs(self) -> set[tuple[tuple[str, object], tuple[str, object]]]:
        """All pairs of this cell's values, each with its axis."""
        return set(itertools.combinations([(axis.name, getattr(self, axis.name)) for axis in fields(self)], 2))


AXES: dict[str, tuple[Any, ...]] = {
    "form": ("aggregated", "disaggregated"),
    "page": (16, 1, 64),
    "cache": ("cold", "warm"),
    "prompt": ("whole", "chunked"),
    "batch": (1, 16),
    "pages": ("ample", "retracted"),
    "drafts": ("none", "ngram", "head"),
}
ALL = [Cell(*values) for values in itertools.product(*AXES.values())]
ALONE = [Cell(), *(replace(Cell(), **{name: value}) for name, values in AXES.items() for value in values[1:])]


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Always the cell with most pairs not yet covered, until none is left."""
    chosen: list[Cell] = []
    missing = set().union(*(cell.pairs() for cell in cells))
    while missing:
        best = max(cells, key=lambda cell: len(cell.pairs() & missing))
        chosen.append(best)
        missing -= best.pairs()
    return chosen


COVER = cover(ALL)
CELLS = list(dict.fromkeys([*ALONE, *COVER]))


@dataclass
class CacheModel:
    """What a worker that forgets nothing has cached: whole pages of every run, matched down to the token."""

    page: int
    runs: list[tuple[int, ...]] = field(default_factory=list)

    def match(self, tokens: Sequence[int]) -> int:
        """The longest common beginning with any run."""
        return max((_common(tokens, run) for run in self.runs), default=0)

    def add(self, tokens: Sequence[int]) -> None:
        """KV of these tokens was computed."""
        self.runs.append(tuple(tokens[: len(tokens) // self.page * self.page]))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def retract_by_hand(engine: Engine, at: int) -> None:
    """Takes every sequence's pages once, at `at` output tokens: a batch of one never runs out of them by itself."""
    schedule = engine.scheduler.schedule

    def retracting(now: float, timing: StepTiming | None = None, ahead: bool = False) -> Plan:
        victims = [seq for seq in engine.scheduler.running if seq.output_len >= at and not seq.retractions]
        if victims and ahead:
            return Plan(0, ahead=True, stalled=True)
        forced = Plan(0)
        for seq in victims:
            engine.scheduler.retract(seq, forced)
        plan = schedule(now, timing, ahead)
        plan.retracted += forced.retracted
        return plan

    engine.scheduler.schedule = retracting  # type: ignore[method-assign]


def settings_of(cell: Cell, head: Path) -> dict[str, Any]:
    """Of the workers of a cell. Drafts are never given up, however badly they do."""
    settings: dict[str, Any] = {
        "prefill": int(cell.form == "disaggregated"),
        "page_size": cell.page,
        "max_batch_tokens": 32 if cell.prompt == "chunked" else 1024,
        "dtype": "float32",
        "decode_settings": {"span_tokens": SPAN, "ageing_s": 60.0},
    }
    if cell.pages == "retracted" and cell.batch > 1:
        settings["decode_settings"]["pages"] = CAPACITY // cell.page
    if cell.drafts == "ngram":
        settings["decode_settings"] |= {"speculative": "ngram", "draft_adaptive": False}
    elif cell.drafts == "head":
        settings |= {"draft_model": str(head), "draft_adaptive": False, "draft_tokens": 3}
    return settings


async def ask(workers: Pair, prompts: Sequence[Sequence[int]], sampling: SamplingParams, batch: int) -> list[Answer]:
    """Answers in the order of the prompts, `batch` requests under way at once."""
    answers: list[Answer] = []
    for first in range(0, len(prompts), batch):
        names = [await workers.submit(prompt, sampling) for prompt in prompts[first : first + batch]]
        answers += [(await workers.answer(name))[0] for name in names]
    return answers


def check_usage(cell: Cell, prompts: Sequence[Sequence[int]], passes: Sequence[Sequence[Answer]]) -> None:
    """What was cached and moved is what could be, where pages do not run out."""
    here, there = CacheModel(cell.page), CacheModel(cell.page)
    for answers in passes:
        for prompt, answer in zip(prompts, answers, strict=True):
            usage = answer.usage
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(answer.tokens))
            local = usage.decode_cached_tokens
            if cell.form == "aggregated":
                assert (usage.moved_tokens, usage.cached_tokens) == (0, local)
            elif cell.pages == "ample":
                assert usage.moved_tokens == len(prompt) - 1 - local
            if cell.batch == 1:
                assert local == here.match(prompt[:-1])
                sender = there.match(prompt[:-1]) if usage.moved_tokens else 0
                assert usage.cached_tokens == max(local, sender)
                here.add((*prompt, *answer.tokens[:-1]))
                if usage.moved_tokens:
                    there.add(prompt[:-1])
    if cell.cache == "warm" and cell.pages == "ample":
        for prompt, answer in zip(prompts, passes[-1], strict=True):
            assert answer.usage is not None
            assert answer.usage.decode_cached_tokens >= (len(prompt) - 1) // cell.page * cell.page


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_greedy_answers_equal_the_reference(cell: Cell, family: str, subjects: dict[str, Any]) -> None:
    subject = subjects[family]
    length = LONG if cell.pages == "retracted" else TOKENS
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=4)
    async with pair(subject.path, **settings_of(cell, subject.head)) as workers:
        if cell.pages == "retracted" and cell.batch == 1:
            retract_by_hand(workers.decode.engine, at=3)
        rounds = 2 if cell.cache == "warm" else 1
        passes = [await ask(workers, subject.prompts, sampling, cell.batch) for _ in range(rounds)]
        retractions = workers.decode.engine.status().retractions
        speculation = workers.decode.engine.speculation
    assert (speculation is None) == (cell.drafts == "none")
    if speculation is not None and (cell.drafts == "head" or cell.cache == "warm"):
        assert speculation.drafted > 100
    answers, near_ties = list(itertools.chain(*passes)), 0
    for prompt, answer in zip(subject.prompts * rounds, answers, strict=True):
        assert (answer.finish, answer.error, len(answer.tokens)) == (FinishReason.LENGTH, "", length)
        verdict = subject.reference.judge(prompt, answer.tokens, answer.logprobs)
        assert verdict.agrees
        near_ties += verdict.near_ties
    assert near_ties < 0.01 * length * len(answers), "the reference must nearly always have an opinion"
    check_usage(cell, subject.prompts, passes)
    if cell.pages == "retracted":
        assert retractions >= (len(answers) if cell.batch == 1 else 1)
    else:
        assert retractions == 0
    if cell.form == "disaggregated":
        assert sum(answer.usage.moved_tokens for answer in passes[0] if answer.usage) > 1000


def test_the_cells_cover_each_axis_alone_and_every_pair() -> None:
    for (one, values), (other, others) in itertools.combinations(AXES.items(), 2):
        for wanted in itertools.product(values, others):
            assert any((getattr(cell, one), getattr(cell, other)) == wanted for cell in COVER), (one, other, wanted)
    for name, values in AXES.items():
        for value in values:
            assert replace(Cell(), **{name: value}) in CELLS
