"""Tiny drafters for the tiny checkpoints of tests: heads with random weights, and models that know the answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tandem.engine.model import LoadedModel, load_model
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.training.draft import Recipe, Trainer
from tandem.training.examples import Example

CPU = torch.device("cpu")


def make_head(path: Path, target: Path | LoadedModel, recipe: Recipe | None = None) -> Path:
    """Writes a head with random weights for a target into folder `path` and returns it. Its drafts are mostly wrong."""
    loaded = load_model(target, "float32", CPU) if isinstance(target, Path) else target
    texts = [Example(tuple(range(loaded.config.vocab_size)), 1)]
    Trainer(loaded, texts, recipe or Recipe(), "a target for tests").save(path, torch.float32)
    return path


def make_draft_model(path: Path, spec: CheckpointSpec, layers: int = 1) -> Path:
    """Writes the first `layers` layers of a checkpoint as a model of its own. All of them: its drafts are right."""
    from safetensors.torch import load_file, save_file

    whole = make_checkpoint(path / "whole", spec)
    make_checkpoint(path, replace(spec, layers=layers))
    tensors = load_file(whole / "model.safetensors")
    kept = {f"model.layers.{layer}." for layer in range(layers)}
    own = {n: t for n, t in tensors.items() if "layers." not in n or any(n.startswith(prefix) for prefix in kept)}
    save_file(own, path / "model.safetensors", metadata={"format": "pt"})
    return path


@dataclass(frozen=True, slots=True)
class Drafted:
    """A checkpoint, and by name what can draft for it: a head, a smaller model, and a twin that is always right."""

    target: Path
    drafters: dict[str, Path]


def make_drafters(path: Path, spec: CheckpointSpec) -> Drafted:
    """Writes all of them into folders in `path`."""
    target = make_checkpoint(path / "target", spec)
    drafters = {
        "head": make_head(path / "head", target),
        "model": make_draft_model(path / "model", spec),
        "twin": make_draft_model(path / "twin", spec, layers=spec.layers),
    }
    return Drafted(target, drafters)
