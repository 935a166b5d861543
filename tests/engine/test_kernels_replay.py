"""Replayed decode steps give the very tokens and logits of steps that are computed, or there is no recording."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels import replay
from tandem.engine.kernels.build import find_compiler
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.replay import SEEN_BEFORE, Replay, Replayed
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.runner import Runner
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import make_head
from tandem.testing.engine import make_seq
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
SPEC = CheckpointSpec(layers=2, vocab=300, max_positions=512, family="qwen2")
PROMPTS = [[(7 * i * i + 3 * row) % 290 for i in range(5 + 17 * row)] for row in range(5)]
TOKENS = 12


def outputs(loaded: LoadedModel, replayed: bool, count: int = 5) -> list[list[int]]:
    """Rows that start one after another and end together, so that several batch sizes are met."""
    loop = RunnerLoop(loaded)
    if not replayed:
        vars(loop.runner)["_replay"] = None
    params = [
        SamplingParams(temperature=row % 2 * 0.9, max_tokens=TOKENS, seed=row, logprobs=1) for row in range(count)
    ]
    seqs = [loop.add(prompt, each) for prompt, each in zip(PROMPTS, params, strict=False)]
    for started in range(1, count + 1):
        for _ in range(SEEN_BEFORE + 2):
            loop.step([seq for seq in seqs[:started] if seq.output_len < TOKENS], 64)
    return loop.finish(seqs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_computed_steps(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(make_checkpoint(tmp_path, replace(SPEC, dtype=dtype)), "auto", CPU)
    answered: list[bool] = []
    run = Replay.run

    def counted(*arguments: object) -> Replayed | None:
        found = run(*arguments)  # type: ignore[arg-type]
        answered.append(found is not None)
        return found

    monkeypatch.setattr(Replay, "run", counted)
    with caplog.at_level(logging.INFO):
        assert outputs(loaded, replayed=True) == outputs(loaded, replayed=False)
    assert sum(answered) > 10, "hardly a step was replayed"
    assert not any("recorded" in record.message for record in caplog.records)


def test_the_kv_of_replayed_steps_is_stored(tmp_path: Path) -> None:
    loaded = load_model(make_checkpoint(tmp_path, SPEC), "auto", CPU)
    pools = []
    for replayed in (True, False):
        loop = RunnerLoop(loaded)
        if not replayed:
            vars(loop.runner)["_replay"] = None
        loop.finish([loop.add(PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=40))])
        pools.append(loop.pool)
    for name in ("k", "v"):
        for layer in range(SPEC.layers):
            assert torch.equal(pools[0].plane(name, layer), pools[1].plane(name, layer))


def test_a_model_with_operations_of_its_own_is_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(make_checkpoint(tmp_path, SPEC), "auto", CPU)
    expected = outputs(loaded, replayed=False, count=1)
    inner = loaded.module.logits

    class Doubling:
        layout, tensors, forward = loaded.module.layout, loaded.module.tensors, loaded.module.forward

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return inner(hidden) * 2.0

    with caplog.at_level(logging.INFO):
        assert outputs(replace(loaded, module=Doubling()), replayed=True, count=1) == expected
    assert [record.message for record in caplog.records if "recorded" in record.message] == [
        "steps of more than 0 tokens are not recorded: the model uses aten.mul.Tensor"
    ]


def test_a_step_that_needs_too_much_memory_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(make_checkpoint(tmp_path, SPEC), "auto", CPU)
    monkeypatch.setattr(replay, "ARENA_BYTES", 16_000)
    with caplog.at_level(logging.INFO):
        assert outputs(loaded, replayed=True) == outputs(loaded, replayed=False)
    (record,) = (record for record in caplog.records if "recorded" in record.message)
    assert record.message.endswith("tokens are not recorded: a recording needs more than 16000 bytes")


def test_torch_kernels_are_not_recorded(tmp_path: Path) -> None:
    kernels = choose_kernels("torch", CPU)
    loaded = load_model(make_checkpoint(tmp_path, SPEC), "auto", CPU, kernels)
    loop = RunnerLoop(loaded)
    assert isinstance(loop.runner, Runner)
    assert vars(loop.runner)["_replay"] is None
    loop.finish([loop.add(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=8))])


def test_recording_loads_no_compiler() -> None:
    script = (
        "import sys, torch; from tandem.engine.kernels.replay import _Watch\n"
        "with _Watch() as watch:\n"
        "    torch.zeros(4).view(2, 2) + 1\n"
        "print(sorted(watch.missed), 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "['aten.add.Tensor', 'aten.zeros.default'] False False\n"


@pytest.mark.parametrize("branches", [1, 2])
def test_steps_that_check_drafts_are_replayed(branches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chains and trees; what is read along of them is there, too."""
    target = make_checkpoint(tmp_path / "target", SPEC)
    head = make_head(tmp_path / "head", target)
    counts: list[int] = []
    run = Replay.run

    def counted(replay: Replay, tokens: InputTokens, *rest: Any) -> Replayed | None:
        found = run(replay, tokens, *rest)
        if found is not None:
            counts.append(len(tokens))
            assert found.taps.joined().shape[0] == len(tokens)
        return found

    monkeypatch.setattr(Replay, "run", counted)
    found = []
    for kernels, drafter in (("native", head), ("native", None), ("torch", head)):
        config = WorkerConfig(
            model=str(target), draft_model=drafter and str(drafter), draft_tokens=3, draft_adaptive=False, pages=64,
            draft_branches=branches if drafter else 1, dtype="float32", kernels=kernels,
        )  # fmt: skip
        engine, _ = build_engine(config)
        seqs = [make_seq(str(row), prompt, 30) for row, prompt in enumerate(PROMPTS[:2])]
        for seq in seqs:
            engine.add(seq)
        if kernels == "native" and drafter is None:
            monkeypatch.setattr(Replay, "run", run)
        while engine.has_work():
            engine.step()
        found.append([seq.tokens for seq in seqs])
    assert found[0] == found[1] == found[2]
    assert sum(count > 2 for count in counts) > 5, "hardly a step with drafts was replayed"
