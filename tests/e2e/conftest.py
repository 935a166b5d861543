"""One random checkpoint for each family, its reference, and prompts of mixed length; made once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import make_head
from tandem.testing.reference import Reference

VOCAB = 400
LENGTHS = (1, 2, 15, 16, 17, 18, 23, 31, 32, 33, 34, 39, 45, 47, 48, 49, 52, 57, 63, 64, 65, 66, 71, 79, 80, 97)
"""Around every page size's borders; `SHARED` adds six that begin alike."""
SHARED = (48, 3, 19, 20, 50, 100)
"""A common beginning of 48 tokens, and how much of its own each has behind it (the first: nothing)."""
SPECS = {
    "llama": CheckpointSpec(layers=3, vocab=VOCAB, max_positions=512, seed=11),
    "qwen2": CheckpointSpec(family="qwen2", layers=3, vocab=VOCAB, max_positions=512, seed=12),
}
TINY = CheckpointSpec(layers=1, heads=2, kv_heads=1, vocab=VOCAB, max_positions=512, std=0.3, seed=13)
"""For what is slow."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, what it should answer, and what it is asked."""

    path: Path
    reference: Reference
    prompts: tuple[tuple[int, ...], ...]
    head: Path
    """A draft head of random weights, which is nearly always wrong."""


def few_prompts(seed: int) -> tuple[tuple[int, ...], ...]:
    source = random.Random(seed)
    short, long, own = (tuple(source.randrange(VOCAB) for _ in range(length)) for length in (5, 17, 4))
    return short, long, long[:16] + own


def make_prompts(seed: int) -> tuple[tuple[int, ...], ...]:
    source = random.Random(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(source.randrange(VOCAB) for _ in range(count))

    beginning, *own = draw(SHARED[0]), *SHARED[1:]
    prompts = [draw(length) for length in LENGTHS] + [beginning] + [beginning + draw(length) for length in own]
    source.shuffle(prompts)
    return tuple(prompts)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Family -> subject; `tiny` has few and short prompts, of which two begin alike."""
    made = {}
    for seed, (family, spec) in enumerate(SPECS.items()):
        folder = tmp_path_factory.mktemp("models")
        path = make_checkpoint(folder / family, spec)
        made[family] = Subject(path, Reference.load(path), make_prompts(seed), make_head(folder / "head", path))
    folder = tmp_path_factory.mktemp("models")
    path = make_checkpoint(folder / "tiny", TINY)
    made["tiny"] = Subject(path, Reference.load(path), few_prompts(0), make_head(folder / "head", path))
    return made
