"""A choice whose text is parsed: the same parts, counts and log-probabilities however its tokens are cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from router.answers.stream import ChoiceStream, Piece
from router.requests.job import OutputOptions
from tandem.testing.tokenizer import END, byte_level_tokenizer
from tandem.text.formats.answer import AnswerFormat
from tandem.text.formats.parts import CallStart, Part, joined
from tandem.text.formats.registry import REASONING_FORMATS, TOOL_FORMATS
from tandem.text.tokenizer import Tokenizer
from tandem.types import Delta, FinishReason, TokenLogprob, Usage

TOKENIZER = Tokenizer(byte_level_tokenizer())
END_ID = TOKENIZER.encode(END)[0]
FORM = AnswerFormat(REASONING_FORMATS["think"], TOOL_FORMATS["hermes"], frozenset({"f"}))
PIECES = [
    "<think>", "</think>", "\n", "Hello", " ", "🙂", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {',
    '"a": "é"', "}}", "<tool", "x < y", "\n\n",
]  # fmt: skip


def play(tokens: list[int], cuts: list[int], options: OutputOptions) -> tuple[ChoiceStream, list[Piece]]:
    stream = ChoiceStream(0, TOKENIZER, options, (), (END_ID,))
    pieces = []
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(bounds):
        last = end == len(tokens)
        entries = tuple(TokenLogprob(token, -float(rank)) for rank, token in enumerate(tokens[start:end], start))
        finish, usage = (FinishReason.STOP, Usage(3, 1, 2)) if last else (None, None)
        stop = END_ID if last else None
        delta = Delta("r", 0, 0, start, tuple(tokens[start:end]), entries, (), finish, stop, usage=usage)
        pieces.append(stream.feed(delta))
    return stream, [piece for piece in pieces if piece is not None]


def parts_of(pieces: list[Piece]) -> list[Part]:
    found = joined(part for piece in pieces for part in piece.parts or ())
    return [CallStart(part.index, "", part.name) if isinstance(part, CallStart) else part for part in found]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([(), ("🙂",), ("</tool_call>",)]),
)
def test_cuts_do_not_matter(texts: list[str], cuts: list[int], stops: tuple[str, ...]) -> None:
    tokens = [*TOKENIZER.encode("".join(texts)), END_ID]
    options = OutputOptions(stop=stops, logprobs=0, form=FORM)
    once, whole = play(tokens, [], options)
    cut, pieces = play(tokens, cuts, options)
    assert parts_of(pieces) == parts_of(whole)
    assert once.reasoning_tokens == cut.reasoning_tokens
    assert (pieces[-1].finish, pieces[-1].called) == (whole[-1].finish, whole[-1].called)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert entries == [entry for piece in whole for entry in piece.logprobs]
    assert all(piece.parts or piece.finish for piece in pieces), "nothing is given out for nothing"
    assert "".join(cut.text) == "".join(once.text)


def test_reasoning_tokens_are_those_up_to_the_closing_marker() -> None:
    thought = TOKENIZER.encode("<think>\nHm. 🙂\n</think>")
    rest = TOKENIZER.encode("\n\nYes.")
    stream, _ = play([*thought, *rest, END_ID], [], OutputOptions(form=FORM))
    assert stream.reasoning_tokens == len(thought)
    stream, _ = play([*thought[:-2], END_ID], [], OutputOptions(form=FORM))
    assert stream.reasoning_tokens == len(thought) - 1
    assert play([END_ID], [], OutputOptions())[0].reasoning_tokens is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_hidden_reasoning_leaves_no_logprobs(texts: list[str], cuts: list[int], begun: bool) -> None:
    tokens = [*TOKENIZER.encode("".join(texts)), END_ID]
    form = replace(FORM, begun="<think>\n" if begun else "")
    shown, pieces = play(tokens, cuts, OutputOptions(logprobs=0, form=form))
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert [placed.entry.token for placed in entries] == tokens
    for each in (cuts, []):
        _, pieces = play(tokens, each, OutputOptions(logprobs=0, form=replace(form, hide_reasoning=True)))
        assert [entry for piece in pieces for entry in piece.logprobs] == entries[shown.reasoning_tokens :]
