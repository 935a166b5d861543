"""Drafts by a model or a head: they change no token, and their KV is cached and handed over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.sequence import Seq
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import make_draft_model, make_head
from tandem.testing.engine import make_seq
from tandem.types import SamplingParams

SPEC = CheckpointSpec(layers=3, vocab=300, max_positions=512, seed=4)
PROMPTS = [[(17 * index * (row + 3) + row) % 290 + 6 for index in range(23 + 9 * row)] for row in range(4)]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=20, logprobs=2)


@dataclass(frozen=True)
class Folders:
    target: Path
    drafters: dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    path = tmp_path_factory.mktemp("drafters")
    target = make_checkpoint(path / "target", SPEC)
    drafters = {
        "head": make_head(path / "head", target),
        "model": make_draft_model(path / "model", SPEC),
        "twin": make_draft_model(path / "twin", SPEC, layers=3),
    }
    return Folders(target, drafters)


def build(folders: Folders, drafter: str | None, **settings: Any) -> Engine:
    draft_model = None if drafter is None else str(folders.drafters[drafter])
    given = {
        "model": str(folders.target),
        "dtype": "float32",
        "pages": 64,
        "threads": 1,
        "draft_adaptive": False,
        **settings,
    }
    return build_engine(WorkerConfig(draft_model=draft_model, **given))[0]


def run(engine: Engine, seqs: list[Seq]) -> list[tuple[list[int], list[Any]]]:
    for seq in seqs:
        engine.add(seq)
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    assert engine.idle_leaks() == []
    return [(seq.tokens[seq.prompt_len :], [each.token for each in seq.output_logprobs]) for seq in seqs]


def seqs(sampling: SamplingParams, suffix: str = "") -> list[Seq]:
    return [make_seq(f"{row}{suffix}", prompt, sampling=sampling) for row, prompt in enumerate(PROMPTS)]


def accepted_share(engine: Engine) -> float:
    assert engine.speculation is not None
    assert engine.speculation.drafted
    return engine.speculation.accepted / engine.speculation.drafted


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("drafter", ["head", "model", "twin"])
def test_drafts_change_no_token(drafter: str, page_size: int, folders: Folders) -> None:
    plain = build(folders, None, page_size=page_size, pages=1024 // page_size)
    drafted = build(folders, drafter, page_size=page_size, pages=1024 // page_size, max_batch_tokens=40)
    for sampling in (replace(SAMPLED, temperature=0.0), SAMPLED):
        expected = run(plain, seqs(sampling))
        assert run(drafted, seqs(sampling)) == expected
        assert run(drafted, seqs(sampling, "warm")) == expected
        assert accepted_share(drafted) > 0.99 or drafter != "twin" or sampling is SAMPLED


def test_a_drafter_that_is_the_target_is_always_right(folders: Folders) -> None:
    """Alone, in chunks, behind a cached prefix and after a retraction: its KV is where it should be."""
    engine = build(folders, "twin", max_batch_tokens=24)
    greedy = replace(SAMPLED, temperature=0.0, logprobs=None)
    for row, prompt in enumerate([PROMPTS[3], PROMPTS[3], PROMPTS[3] + PROMPTS[0]]):
        run(engine, [make_seq(f"{row}", prompt, sampling=greedy)])
        assert accepted_share(engine) == 1.0
    seq = make_seq("retracted", PROMPTS[2], sampling=greedy)
    engine.add(seq)
    while seq.output_len < 8:
        engine.step()
    engine.scheduler.retract(seq, engine.scheduler.schedule(0.0))
    while engine.has_work():
        engine.step()
    assert seq.retractions == 1
    assert accepted_share(engine) == 1.0
