"""Greedy answers are those of `transformers` in float32, whatever way they are computed.

Every axis alone, and every pair of values of two axes. Triton's interpreter is slow: with it, a tiny model is asked
three short prompts, and not two models thirty-two each.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar

from decode_worker.grammars import Grammars, continuation
from tandem.cluster import StepTiming
from tandem.engine.engine import Engine
from tandem.engine.grammar.compiler import CompilerSettings
from tandem.engine.grammar.compiler_process import compile_one
from tandem.engine.grammar.constraint import GrammarConstraint, Vocabulary
from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.engine.kernels.build import find_compiler
from tandem.engine.scheduler import Plan
from tandem.testing.pair import Answer, Pair, pair
from tandem.text.tokenizer import Tokenizer
from tandem.types import FinishReason, Grammar, GrammarKind, SamplingParams

TOKENS = 8
LONG = 24
"""Output tokens where pages must run out: admission keeps room for 16 more of each sequence that runs."""
CAPACITY = 256
"""Tokens that fit into the pages where they must run out: less than 16 prompts need."""
SPAN = 32
SLOW = frozenset({"triton"})
"""Kernels that compute little."""
FEW_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination. The first value of each axis is the plain one."""

    form: str = "aggregated"
    page: int = 16
    cache: str = "cold"
    prompt: str = "whole"
    batch: int = 1
    pages: str = "ample"
    overlap: str = "off"
    kernels: str = "native"
    drafts: str = "none"
    answers: str = "free"

    def __str__(self) -> str:
        what = f"{self.form}-page{self.page}-{self.cache}-{self.prompt}-batch{self.batch}-{self.pages}"
        return f"{what}-overlap {self.overlap}-{self.kernels}-drafts {self.drafts}-{self.answers}"

    @property
    def slow(self) -> bool:
        """Whether it is asked little."""
        return self.kernels in SLOW

    @property
    def by_hand(self) -> bool:
        """Whether the test has to retract sequences: those under way never run out of pages by themselves."""
        return self.pages == "retracted" and (self.batch == 1 or self.slow or self.answers != "free")

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
    "overlap": ("off", "on"),
    "kernels": ("native", "torch", "triton"),
    "drafts": ("none", "ngram", "model", "head", "tree"),
    "answers": ("free", "grammar"),
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
CASES = [(cell, family) for cell in CELLS for family in (("tiny",) if cell.slow else ("llama", "qwen2"))]


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


def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all workers of this process: Triton's interpreter is for one thread."""
    lock = threading.Lock()

    @contextmanager
    def held() -> Iterator[None]:
        with lock:
            yield

    monkeypatch.setattr("tandem.worker.process._compute_slots", lambda key: SimpleNamespace(held=held))


def compile_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars without a process of their own, which takes seconds to start."""

    async def compiled(grammars: Grammars, grammar: Grammar) -> Callable[[], GrammarConstraint]:
        settings: CompilerSettings = vars(grammars)["_settings"]
        info = load_vocabulary(settings.folder, settings.vocab_size, [*settings.stop_ids])
        found = compile_one(xgrammar.GrammarCompiler(info, max_threads=1), grammar.kind.value, grammar.source)
        vocabulary = Vocabulary(info, continuation(Tokenizer.load(settings.folder).encode))
        return lambda: GrammarConstraint(found, vocabulary)

    monkeypatch.setattr(Grammars, "compile", compiled)


def settings_of(cell: Cell, subject: Any) -> dict[str, Any]:
    """Of the workers of a cell. Drafts are never given up, however badly they do."""
    settings: dict[str, Any] = {
        "prefill": int(cell.form == "disaggregated"),
        "page_size": cell.page,
        "max_batch_tokens": 1024 if cell.prompt == "whole" else 8 if cell.slow else 32,
        "dtype": "float32",
        "overlap": cell.overlap,
        "kernels": cell.kernels,
        "decode_settings": {"span_tokens": SPAN, "ageing_s": 60.0},
    }
    if cell.pages == "retracted" and not cell.by_hand:
        settings["decode_settings"]["pages"] = CAPACITY // cell.page
    if cell.drafts == "ngram":
        settings["decode_settings"] |= {"speculative": "ngram", "draft_adaptive": False}
    elif cell.drafts != "none":
        drafter = subject.draft_model if cell.drafts == "model" else subject.head
        settings |= {"draft_model": str(drafter), "draft_adaptive": False, "draft_tokens": 3}
    if cell.drafts == "tree":
        settings |= {"draft_branches": 2, "draft_tokens": 5}
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


# Where an exponential overflows, its reciprocal is the 0 that is meant; numpy warns of it, a GPU does not.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("cell", "family"), CASES, ids=str)
async def test_greedy_answers_equal_the_reference(
    cell: Cell, family: str, subjects: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if cell.kernels == "native" and find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    if cell.kernels == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    subject = subjects[family]
    prompts, length = subject.prompts, LONG if cell.pages == "retracted" else TOKENS
    if cell.slow:
        length = FEW_TOKENS
        one_step_at_a_time(monkeypatch)
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=4)
    if cell.answers == "grammar":
        compile_here(monkeypatch)
        # Without log-probabilities: text that the grammar forces is not asked of the model then.
        sampling = replace(sampling, grammar=Grammar(GrammarKind.REGEX, subject.pattern.source), logprobs=None)
    async with pair(subject.path, **settings_of(cell, subject)) as workers:
        if cell.by_hand:
            retract_by_hand(workers.decode.engine, at=3)
        rounds = 2 if cell.cache == "warm" else 1
        passes = [await ask(workers, prompts, sampling, cell.batch) for _ in range(rounds)]
        retractions = workers.decode.engine.status().retractions
        speculation = workers.decode.engine.speculation
    assert (speculation is None) == (cell.drafts == "none")
    if speculation is not None and (cell.drafts != "ngram" or cell.cache == "warm") and cell.answers == "free":
        assert speculation.drafted > (2 if cell.slow else 100)
    answers, near_ties = list(itertools.chain(*passes)), 0
    for prompt, answer in zip(prompts * rounds, answers, strict=True):
        assert (answer.finish, answer.error, len(answer.tokens)) == (FinishReason.LENGTH, "", length)
        bound = None if sampling.grammar is None else subject.pattern.allowed(answer.tokens)
        verdict = subject.reference.judge(prompt, answer.tokens, answer.logprobs or None, bound)
        assert verdict.agrees
        near_ties += verdict.near_ties
    assert near_ties < 0.01 * length * len(answers), "the reference must nearly always have an opinion"
    check_usage(cell, prompts, passes)
    if cell.pages == "retracted":
        assert retractions >= (len(answers) if cell.by_hand else 1)
    else:
        assert retractions == 0
    if cell.form == "disaggregated":
        moved = sum(answer.usage.moved_tokens for answer in passes[0] if answer.usage)
        assert moved > (20 if cell.slow else 1000)


def test_the_cells_cover_each_axis_alone_and_every_pair() -> None:
    for (one, values), (other, others) in itertools.combinations(AXES.items(), 2):
        for wanted in itertools.product(values, others):
            assert any((getattr(cell, one), getattr(cell, other)) == wanted for cell in COVER), (one, other, wanted)
    for name, values in AXES.items():
        for value in values:
            assert replace(Cell(), **{name: value}) in CELLS
