"""Checks of a model that is to be served here: found, known, whole, and small enough."""

from __future__ import annotations

from pathlib import Path

from tandem.cli.doctor.machine import GIB, available_memory
from tandem.cli.doctor.report import Check, Group, State, ok_or
from tandem.engine.model.loader import find_tensors, read_config
from tandem.errors import CheckpointError, ConfigError
from tandem.hub import resolve_model

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


def check_model(name: str) -> Group:
    """Reads configuration and headers; no weights."""
    try:
        folder = Path(resolve_model(name))
    except ConfigError as error:
        fix = "give a folder with config.json and *.safetensors, or a hub id; `demo` is the shipped model"
        return Group("model", [Check("found", str(error), State.ERROR, fix)])
    checks = [Check("found", str(folder))]
    try:
        config, tensors = read_config(folder), find_tensors(folder)
    except CheckpointError as error:
        fix = "docs/models.md lists the families that are served; download again what is cut short"
        return Group("model", [*checks, Check("checkpoint", str(error), State.ERROR, fix)])
    size = sum(tensor.size for tensor in tensors.values())
    found = f"{len(tensors)} tensors, {size / GIB:.2f} GiB, context {config.context_limit} tokens"
    checks.append(Check("checkpoint", found))
    available = available_memory()
    fits = available is None or size < available
    fix = "on CPUs, stop what else runs or take a smaller model; on GPUs, memory of the machine counts while loading"
    checks.append(ok_or(f"{size / GIB:.2f} GiB of weights for each worker", "memory", fits, fix))
    tokenizer = next((each for each in TOKENIZERS if (folder / each).is_file()), "")
    fix = f"the router needs one of {', '.join(TOKENIZERS)} in the folder"
    checks.append(ok_or(tokenizer or "none", "tokenizer", bool(tokenizer), fix, State.ERROR))
    return Group("model", checks)
