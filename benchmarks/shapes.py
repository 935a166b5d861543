"""Checkpoints of a realistic shape with random weights and the shipped tokenizer, made on the spot.

Speed does not depend on what weights say, so nothing has to be downloaded; all systems of a comparison read the same
files.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tandem.demo import MODEL_PATH
from tandem.hub import resolve_model

CONTEXT = 8192

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7m": {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 1664, "tie_word_embeddings": False,
    },
    "qwen2-370m": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4992, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Fields of config.json: 7M parameters with 2 KiB of KV a token, and 370M with 12 KiB."""


def checkpoint(name: str, cache: Path | None = None) -> Path:
    """The folder of a shape, made when it is not in `cache` yet; of any other name, what `tandem up` would take.

    Raises ConfigError when there is no such model.
    """
    if name not in SHAPES:
        return Path(resolve_model(name))
    folder = (cache or Path(tempfile.gettempdir()) / "tandem-benchmarks") / name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        _write(partial, SHAPES[name])
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def _write(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    fields = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(
        shape["model_type"],
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
