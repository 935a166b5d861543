"""Drafts by a model or a head: they change no token, and their KV is cached and handed over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.sequence import ROOT, Draft, Seq
from tandem.engine.spec.model_drafter import _Track
from tandem.errors import CheckpointError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import Drafted, make_draft_model, make_drafters, make_head
from tandem.testing.engine import make_seq
from tandem.training.draft import Recipe
from tandem.types import SamplingParams

SPEC = CheckpointSpec(layers=3, vocab=300, max_positions=512, seed=4)
PROMPTS = [[(17 * index * (row + 3) + row) % 290 + 6 for index in range(23 + 9 * row)] for row in range(4)]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=20, logprobs=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    return make_drafters(tmp_path_factory.mktemp("drafters"), SPEC)


def build(folders: Drafted, drafter: str | None, **settings: Any) -> Engine:
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
def test_drafts_change_no_token(drafter: str, page_size: int, folders: Drafted) -> None:
    plain = build(folders, None, page_size=page_size, pages=1024 // page_size)
    drafted = build(folders, drafter, page_size=page_size, pages=1024 // page_size, max_batch_tokens=40)
    for sampling in (replace(SAMPLED, temperature=0.0), SAMPLED):
        expected = run(plain, seqs(sampling))
        assert run(drafted, seqs(sampling)) == expected
        assert run(drafted, seqs(sampling, "warm")) == expected
        assert accepted_share(drafted) > 0.99 or drafter != "twin" or sampling is SAMPLED


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("page_size", [4, 16])
def test_shared_pages_are_not_written_again(page_size: int, branches: int, folders: Drafted) -> None:
    """A prompt that is cached but for its last token has a draft in its first step; what is accepted is a guess yet."""
    settings = {"page_size": page_size, "pages": 1024 // page_size, "verify_kv": 1.0, "draft_branches": branches}
    for drafter in ("twin", "model", "head"):
        engine = build(folders, drafter, **settings)
        greedy = replace(SAMPLED, temperature=0.0, logprobs=None, max_tokens=40)
        for round_ in range(4):
            run(engine, [make_seq(f"{round_}-{row}", PROMPTS[3], sampling=greedy) for row in range(1 + round_ % 2)])
        assert engine.memory.checks.checked > 0
        assert engine.memory.checks.corrupt == 0


def test_few_features_do_not_keep_a_whole_step(folders: Drafted) -> None:
    track, step = _Track(valid=1000), torch.zeros(4096, 64)
    for at in range(100):
        track.keep(at, step[at : at + 1])
    held = {run.untyped_storage().data_ptr(): run.untyped_storage().nbytes() for _, run in track.features}
    assert sum(held.values()) < 64 * 64 * 64 * 4


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("drafter", ["head", "model", "twin"])
def test_trees_change_no_token(drafter: str, page_size: int, folders: Drafted) -> None:
    plain = build(folders, None, page_size=page_size, pages=1024 // page_size)
    settings = {"draft_branches": 3, "draft_tokens": 7, "page_size": page_size, "pages": 1024 // page_size}
    drafted = build(folders, drafter, **settings)
    for sampling in (replace(SAMPLED, temperature=0.0), SAMPLED):
        expected = run(plain, seqs(sampling))
        assert run(drafted, seqs(sampling)) == expected
        assert run(drafted, seqs(sampling, "warm")) == expected


def test_the_likeliest_path_of_a_tree_is_that_of_a_chain(folders: Drafted) -> None:
    """A drafter that is the target knows the next token; its trees hold it, and others beside."""
    engine = build(folders, "twin", draft_branches=2, draft_tokens=6)
    speculation = engine.speculation
    assert speculation is not None
    found: list[Draft] = []
    propose = speculation.drafter.propose

    def watched(seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        drafts = propose(seqs, limits)
        found.extend(drafts)
        return drafts

    speculation.drafter.propose = watched  # type: ignore[method-assign]
    steps = 0
    greedy = replace(SAMPLED, temperature=0.0, logprobs=None)
    seq = make_seq("a", PROMPTS[3], sampling=greedy)
    engine.add(seq)
    while engine.has_work():
        output = engine.step()
        steps += len(output.drafts)
        assert all(outcome.accepted >= 1 for outcome in output.drafts)
    whole = [draft for draft in found if len(draft) == 6]
    assert whole
    assert all(draft.parents is not None and max(draft.depths()) >= 2 for draft in whole)
    assert any(len(draft.children(ROOT)) == 2 for draft in whole)
    assert speculation.accepted > steps


def test_a_drafter_that_is_the_target_is_always_right(folders: Drafted) -> None:
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


def refused(folders: Drafted, drafter: Path) -> str:
    config = WorkerConfig(model=str(folders.target), draft_model=str(drafter), dtype="float32", pages=8)
    with pytest.raises(CheckpointError) as error:
        build_engine(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_head_for_another_target_is_refused(folders: Drafted, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", replace(SPEC, seed=5))
    head = make_head(tmp_path / "head", other)
    config = json.loads((head / "config.json").read_text())
    text = refused(folders, head)
    assert f"{head} is a draft head for a target for tests with fingerprint {config['target_fingerprint']}" in text
    assert f"the model served is {folders.target} with fingerprint " in text
    del config["target_fingerprint"]  # as heads of other trainers have none
    (head / "config.json").write_text(json.dumps(config))
    build_engine(WorkerConfig(model=str(folders.target), draft_model=str(head), dtype="float32", pages=8))
    (head / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    assert f"a draft head for a hidden_size of 96; {folders.target} has 64" in refused(folders, head)


def test_a_draft_model_with_another_vocabulary_is_refused(folders: Drafted, tmp_path: Path) -> None:
    smaller = make_checkpoint(tmp_path / "smaller", replace(SPEC, vocab=290, layers=1))
    text = refused(folders, smaller)
    assert f"draft model {smaller} has another vocabulary than {folders.target}: 290 tokens" in text
    assert "the model served has 300; they differ from token 290 on" in text
    (smaller / "tokenizer.json").unlink()
    assert refused(folders, smaller).endswith("290 tokens, and the model served has 300")


@pytest.mark.parametrize("damage", ["missing", "empty", "tensor", "layers", "offsets"])
def test_a_damaged_drafter_is_refused(damage: str, folders: Drafted, tmp_path: Path) -> None:
    head = make_head(tmp_path / "head", folders.target, Recipe(draft_vocab=50))
    config = json.loads((head / "config.json").read_text())
    tensors = load_file(head / "model.safetensors")
    match damage:
        case "missing":
            assert refused(folders, tmp_path / "none") == f"no checkpoint folder at {tmp_path / 'none'}"
        case "empty":
            (head / "config.json").unlink()
            assert f"cannot read {head / 'config.json'}: No such file" in refused(folders, head)
        case "tensor":
            save_file({name: tensors[name] for name in tensors if name != "fc.weight"}, head / "model.safetensors")
            assert "tensor fc.weight is missing" in refused(folders, head)
        case "layers":
            config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 3]
            (head / "config.json").write_text(json.dumps(config))
            assert "reads layers (0, 3); the target has 0..2" in refused(folders, head)
        case "offsets":
            save_file(tensors | {"d2t": tensors["d2t"] + 290}, head / "model.safetensors")
            assert "d2t names tokens beyond the vocabulary of 300" in refused(folders, head)


@pytest.mark.parametrize("pause", [0, 3, 40])
def test_slots_are_made_up_only_where_the_drafters_window_still_reaches(pause: int, folders: Drafted) -> None:
    """A drafter that was not asked for a while has slots to make up; what they see may have been given up."""
    path = make_draft_model(folders.target.parent / f"windowed-{pause}", replace(SPEC, family="mistral"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "sliding_window": 24}))
    drafted = build(Drafted(folders.target, {"windowed": path}), "windowed", page_size=4, pages=128)
    assert any(group.window == 24 for group in drafted.layout.groups)
    prompt = [(13 * index) % 290 + 6 for index in range(70)]
    greedy = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    expected = run(build(folders, None, page_size=4, pages=128), [make_seq("plain", prompt, sampling=greedy)])
    speculation = drafted.speculation
    assert speculation is not None
    seq = make_seq("drafted", prompt, sampling=greedy)
    drafted.add(seq)
    while seq.output_len < 5:
        drafted.step()
    asked, speculation.draft = speculation.draft, lambda plan: None  # type: ignore[method-assign]
    for _ in range(pause):
        drafted.step()
    speculation.draft = asked  # type: ignore[method-assign]
    while drafted.has_work():
        drafted.step()
        drafted.check_integrity()
    assert drafted.idle_leaks() == []
    assert [(seq.tokens[seq.prompt_len :], [])] == expected
