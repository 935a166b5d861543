"""CVE-2025-62164, CVE-2025-66448, CVE-2026-22807: tensors and code that would run when a model is loaded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from tandem.config import DecodeConfig
from tandem.engine.build import build_engine
from tandem.errors import CheckpointError, TandemError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.text.tokenizer import Tokenizer
from tests.security.rig import Front


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._file}",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", CheckpointSpec(layers=1, vocab=300, max_positions=128))


def test_pickled_weights_are_not_read(model: Path, tmp_path: Path) -> None:
    weights = next(model.glob("*.safetensors"))
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        torch.save({"weight": Canary(tmp_path / "canary")}, model / name)
    config = DecodeConfig(model=str(model), kv_mib=1)
    build_engine(config)
    assert not (tmp_path / "canary").exists()
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError):
        build_engine(config)
    assert not (tmp_path / "canary").exists()


def test_code_of_a_checkpoint_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps({**content, "auto_map": classes}))
    for load in (lambda: build_engine(DecodeConfig(model=str(model), kv_mib=1)), lambda: Tokenizer.load(str(model))):
        with contextlib.suppress(TandemError):  # refused is as good as ignored
            load()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["prompt_embeds", "input_embeds", "inputs_embeds", "image_data"])
async def test_requests_bring_no_tensors(name: str, anyone: httpx.AsyncClient, opened: Front) -> None:
    answer = await anyone.post("/v1/completions", json={"prompt": "a", name: "gASVAAAAAAAAAA=="})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert opened.dispatcher.requests == []
