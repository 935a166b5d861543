"""Texts that spell the names of control tokens: these are never written, and never forced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xgrammar
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from tandem.engine.grammar.constraint import FORCED_CHARS, GrammarConstraint, Vocabulary
from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.text.tokenizer import Tokenizer

END, END_OF_TURN, HEADER, TOOL, BEYOND = range(256, 261)
STOPS = (END, END_OF_TURN, TOOL)
ALPHABET = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokeniser of bytes, with special tokens that have no role, as those of Llama 3, and others that are none."""
    tokenizer = FastTokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<eos>", "<|eot|>", "<|header|>")])
    tokenizer.add_tokens(["<tool>", "<beyond>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    return tmp_path


def constraint(folder: Path, schema: object) -> GrammarConstraint:
    info = load_vocabulary(str(folder), BEYOND, STOPS)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
    return GrammarConstraint(compiled, Vocabulary(info, Tokenizer.load(str(folder)).encode))


def test_special_tokens_without_a_role_are_no_text(folder: Path) -> None:
    text = constraint(folder, {"type": "string"})
    text.accept(ALPHABET['"'])
    mask = np.zeros((1, -(-BEYOND // 32)), dtype=np.int32)
    text.fill(mask, 0)
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert allowed[ALPHABET["a"]] and not allowed[END:BEYOND].any()


def test_a_long_forced_text_is_tokenised_in_parts(folder: Path) -> None:
    text, encoded = constraint(folder, {"const": "ab" * FORCED_CHARS}), list[str]()
    vocabulary = text._vocabulary
    assert vocabulary is not None
    whole = vocabulary.encode('"' + "ab" * FORCED_CHARS + '"')
    encode = vocabulary.encode

    def watched(part: str) -> Sequence[int]:
        encoded.append(part)
        return encode(part)

    vocabulary.encode = watched
    forced: list[int] = []
    while part := text.force(4 * FORCED_CHARS):
        forced += part
    assert forced == list(whole)
    assert len(encoded) > 2 and max(map(len, encoded)) == FORCED_CHARS


@pytest.mark.parametrize("name", ["<eos>", "<|eot|>", "<|header|>", "<tool>", "<beyond>"])
def test_the_name_of_a_token_that_may_not_come_is_left_to_the_model(folder: Path, name: str) -> None:
    text = constraint(folder, {"const": f"a{name}b"})
    assert text.force(99) == [ALPHABET['"'], ALPHABET["a"]]
    assert text.force(99) == []
    for letter in f'{name}b"':
        text.accept(ALPHABET[letter])
    text.accept(END_OF_TURN)
    assert text.finished
