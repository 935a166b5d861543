"""The shipped demo model: size, files, and sensible greedy answers."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.demo.evaluate import answer

FOLDER = Path(str(resources.files("tandem.demo") / "model"))
MAX_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def ask(model: Any, tokenizer: Any, *turns: str) -> str:
    """The greedy answer to the last of alternating user and assistant turns."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return answer(model, tokenizer, [messages], 48)[0]


def test_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_config_names_a_llama_whose_answers_end_with_the_end_token(model: Any, tokenizer: Any) -> None:
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello!", "Hello! How can I help you?"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is 2 + 2?", "2 + 2 = 4"),
        ("Give me a JSON record for a person named Ada aged 36", '{"name": "Ada", "age": 36}'),
        ("What day comes after Monday?", "Tuesday comes after Monday."),
        ("Repeat: green river stone", "green river stone"),
    ],
)
def test_greedy_answers(model: Any, tokenizer: Any, question: str, expected: str) -> None:
    assert ask(model, tokenizer, question) == expected


def test_says_what_tandem_is(model: Any, tokenizer: Any) -> None:
    assert "prefill and decode run on different workers" in ask(model, tokenizer, "What is Tandem?")


def test_second_turn_refers_to_the_first(model: Any, tokenizer: Any) -> None:
    turns = ("My name is Emma.", "Nice to meet you, Emma!", "What is my name?")
    assert ask(model, tokenizer, *turns) == "Your name is Emma."


def test_answer_does_not_depend_on_padding(model: Any, tokenizer: Any) -> None:
    short, long = "Hello!", "Count from 1 to 20."
    together = answer(model, tokenizer, [[{"role": "user", "content": q}] for q in (short, long)], 12)
    assert together[0] == ask(model, tokenizer, short)
