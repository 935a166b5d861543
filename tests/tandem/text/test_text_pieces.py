"""Incremental detokenising and stop strings against their one-shot definitions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.testing.tokenizer import byte_fallback_tokenizer, byte_level_tokenizer
from tandem.text.detokenizer import detokenizer
from tandem.text.stop import StopStrings
from tandem.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(byte_level_tokenizer())
BYTE_FALLBACK = Tokenizer(byte_fallback_tokenizer())
TOKENIZERS = {"byte_level": BYTE_LEVEL, "byte_fallback": BYTE_FALLBACK}
TEXTS = [
    "Hello, world!",
    " leading",
    "中文 🙂 — naïve",
    "a\n\n  b",
    "🙂🙃👩‍👩‍👧",
    "\ufffd real replacement",
    "tab\tnul",
]


def pieces(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    stream = detokenizer(tokenizer, context)
    return [stream.feed(token) for token in ids] + [stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_random_ids_concatenate_to_the_one_shot_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 3), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips_and_no_piece_splits_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    got = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in got)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_byte_level_text_round_trips(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    if not BYTE_LEVEL.special_ids & set(ids):
        assert "".join(pieces(BYTE_LEVEL, ids)) == text


def test_special_tokens_are_skipped() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("<|user|>Hello<|end|>")
        assert "".join(pieces(tokenizer, ids)) == "Hello"


def test_a_word_after_a_context_keeps_its_space() -> None:
    """Sentencepiece drops the space of a text's first word; an answer that follows a prompt is not a text's start."""
    prompt, answer = BYTE_FALLBACK.encode("The cat"), BYTE_FALLBACK.encode("sat")
    assert "".join(pieces(BYTE_FALLBACK, answer)) == "sat"
    assert "".join(pieces(BYTE_FALLBACK, answer, tuple(prompt))) == " sat"


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    ids = BYTE_LEVEL.encode("🙂")
    assert len(ids) > 1
    got = pieces(BYTE_LEVEL, ids[:1])
    assert got[0] == ""
    assert "".join(got) == BYTE_LEVEL.decode(ids[:1])


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string that is completed first, the longest if several are."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            hit = max(done, key=len)
            return text[: end - len(hit)], hit
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=0, max_size=4),
)
def test_stop_strings_agree_with_their_definition(parts: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    out = [stream.feed(part) for part in parts]
    out.append(stream.finish())
    expected, hit = naive_stop("".join(parts), stops)
    assert stream.hit == hit
    assert "".join(out) == expected


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_what_may_start_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    out = ""
    for index, char in enumerate(text):
        out += stream.feed(char)
        if stream.hit is not None:
            return
        held = text[len(out) : index + 1]
        longest = max(
            (k for k in range(index + 2) for s in stops if k < len(s) and text[: index + 1].endswith(s[:k])), default=0
        )
        assert len(held) == longest


def test_long_self_similar_stop_strings_cost_linear_work() -> None:
    stream = StopStrings(["a" * 1023 + "b"] * 16)
    assert sum(len(stream.feed("a" * 100)) for _ in range(50)) == 5000 - 1023
