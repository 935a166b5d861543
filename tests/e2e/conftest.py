"""One random checkpoint for each family, its reference, and prompts of mixed length; made once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.testing.allowed import Pattern
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafters import make_draft_model, make_head
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
PHRASES = r"(?:(?:say|ask) [a-h]{1,3} = [a-h ]{2,6}; ){40}"
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
    draft_model: Path
    """The first layers of the checkpoint as a model of their own."""
    pattern: Pattern
    """What answers may be made to look like; with parts that leave no choice."""


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


def make_subject(folder: Path, spec: CheckpointSpec, prompts: tuple[tuple[int, ...], ...]) -> Subject:
    path = make_checkpoint(folder / folder.name.rstrip("0123456789"), spec)  # served by the name of its folder
    drafter = make_draft_model(folder / "drafter", spec, layers=1)
    info = load_vocabulary(str(path), spec.vocab, [])
    pattern = Pattern(PHRASES, info.decoded_vocab)
    return Subject(path, Reference.load(path), prompts, make_head(folder / "head", path), drafter, pattern)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Family -> subject; `tiny` has few and short prompts, of which two begin alike."""
    made = {
        family: make_subject(tmp_path_factory.mktemp(family), spec, make_prompts(seed))
        for seed, (family, spec) in enumerate(SPECS.items())
    }
    return made | {"tiny": make_subject(tmp_path_factory.mktemp("tiny"), TINY, few_prompts(0))}
