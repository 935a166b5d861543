"""`tandem train-draft` from end to end, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli.app import run
from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint


def test_a_head_is_trained_and_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = make_checkpoint(tmp_path / "target", CheckpointSpec(layers=2, vocab=300, max_positions=256))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {word}"}) for word in "abcdefgh"))
    settings = ["--steps", "3", "--max-tokens", "8", "--draft-vocab", "60", "--threads", "1", "--kv-mib", "4"]
    out = tmp_path / "head"
    assert run(["train-draft", str(target), "--prompts", str(prompts), "--out", str(out), *settings]) == 0
    told = capsys.readouterr().err
    assert "step 3: loss " in told
    assert "--draft-model" in told
    config = json.loads((out / "config.json").read_text())
    assert (config["target_name"], config["draft_vocab_size"]) == ("target", 60)
    build_engine(WorkerConfig(model=str(target), draft_model=str(out), pages=8))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--prompts: a file is needed"),
        (["--prompts", "/none"], "--prompts is /none, which cannot be read"),
        (["--prompts", "/none", "--steps", "0"], "--steps: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-draft", "demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1


def test_workers_name_a_drafter_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["decode", "demo", "--draft-model", "/nowhere"]) == 2
    assert "draft_model is /nowhere; there is no such folder" in capsys.readouterr().err
