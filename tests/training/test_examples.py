"""Texts to learn from: what a file of prompts holds, how the target goes on, and how batches are made."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.errors import ConfigError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.text.tokenizer import Tokenizer
from tandem.training.examples import Example, Prompt, batches, continue_prompts, read_prompts
from tandem.types import SamplingParams


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("target"), CheckpointSpec(layers=1, vocab=300))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_chats_texts_and_beginnings_are_read(target: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(target))
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    found = read_prompts(write(tmp_path / "p", chat, "", {"prompt": "once"}, {"text": "all"}), tokenizer)
    assert [tokenizer.decode(prompt.ids) for prompt in found] == ["hi", "once", "all"]
    assert [prompt.whole for prompt in found] == [False, False, True]
    assert tokenizer.decode(found[0].ids, skip_special_tokens=False).endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ('{"prompt": ""}', "an empty text"),
        ('{"text": 3}', "a int"),
        ('{"chat": 1}', "text"),
        ("3", ""),
    ],
)
def test_a_wrong_line_is_named(line: str, reason: str, target: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p", {"prompt": "fine"}, line)
    with pytest.raises(ConfigError, match=f"--prompts: line 2 of .* has no valid messages, prompt or text: .*{reason}"):
        read_prompts(path, Tokenizer.load(str(target)))


def test_a_missing_or_empty_file_is_named(target: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(target))
    with pytest.raises(ConfigError, match=r"--prompts is .*nothing, which cannot be read: .*No such file"):
        read_prompts(tmp_path / "nothing", tokenizer)
    with pytest.raises(ConfigError, match=r"--prompts is .*p, which holds no line"):
        read_prompts(write(tmp_path / "p", ""), tokenizer)


def test_the_target_goes_on_by_itself(target: Path) -> None:
    engine, _ = build_engine(WorkerConfig(model=str(target), dtype="float32", pages=8, threads=1))
    prompts = [Prompt((6, 7, 8)), Prompt((9, 10)), Prompt(tuple(range(6, 20)), whole=True), Prompt((6,) * 200)]
    sampling, done = SamplingParams(temperature=5.0, max_tokens=12, seed=1), list[int]()
    first = continue_prompts(engine, prompts, frozenset(), sampling, done.append)
    assert [example.ids[: example.start] for example in first] == [(6, 7, 8), (9, 10), (6,)]
    assert [len(example.ids) for example in first] == [15, 14, 14]
    assert done[-1] == 3 and done == sorted(done)
    assert continue_prompts(engine, prompts, frozenset(), sampling, done.append) == first
    other = SamplingParams(temperature=5.0, max_tokens=12, seed=2)
    again = continue_prompts(engine, prompts, frozenset(), other, done.append)
    assert again[0] == first[0], "every other one is greedy"
    assert again[1] != first[1]


def test_batches_hold_texts_of_like_length_in_an_order_of_the_seed() -> None:
    texts = [Example(tuple(range(length)), 1) for length in (3, 50, 4, 60, 5, 200, 6)]
    once = list(islice(batches(texts, 100, 0), 4))
    assert sorted(len(text.ids) for batch in once for text in batch) == [3, 4, 5, 6, 50, 60, 200]
    for batch in once:
        assert len(batch) == 1 or len(batch) * max(len(text.ids) for text in batch) <= 100
    assert once == list(islice(batches(texts, 100, 0), 4))
    assert any(once != list(islice(batches(texts, 100, seed), 4)) for seed in range(1, 5))
