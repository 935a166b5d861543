"""A choice's pieces do not depend on how its tokens were cut into deltas."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.answers.stream import ChoiceStream, Piece
from router.requests.job import OutputOptions
from tandem.errors import Internal
from tandem.testing.tokenizer import END, byte_level_tokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.types import Delta, FinishReason, TokenLogprob, Usage

TOKENIZER = Tokenizer(byte_level_tokenizer())
END_ID = TOKENIZER.encode(END)[0]
USAGE = Usage(3, 1, 2)


def delta(first: int, tokens: list[int], finish: FinishReason | None = None, logprobs: bool = True) -> Delta:
    entries = tuple(TokenLogprob(token, -float(first + rank)) for rank, token in enumerate(tokens)) if logprobs else ()
    stop = tokens[-1] if finish is FinishReason.STOP and tokens else None
    usage = USAGE if finish else None
    return Delta("r", 0, 0, first, tuple(tokens), entries, (), finish, stop, usage=usage)


def play(tokens: list[int], cuts: list[int], options: OutputOptions) -> tuple[ChoiceStream, list[Piece]]:
    stream = ChoiceStream(0, TOKENIZER, options, (), (END_ID,))
    pieces = []
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(bounds):
        finish = FinishReason.STOP if end == len(tokens) else None
        pieces.append(stream.feed(delta(start, tokens[start:end], finish)))
    return stream, [piece for piece in pieces if piece is not None]


words = st.lists(st.sampled_from(["Hello", ", ", "world", "🙂", "naïve", " ", "\n\n", "aab"]), min_size=1, max_size=8)


@given(words, st.lists(st.integers(0, 60), max_size=6), st.sampled_from([(), ("world",), ("aab", "\n\n"), ("🙂",)]))
def test_cuts_do_not_matter(parts: list[str], cuts: list[int], stops: tuple[str, ...]) -> None:
    text = "".join(parts)
    tokens = [*TOKENIZER.encode(text), END_ID]
    options = OutputOptions(stop=stops, logprobs=0)
    once, whole = play(tokens, [], options)
    cut, pieces = play(tokens, cuts, options)
    expected = text
    for stop in stops:
        expected = min(expected, text.partition(stop)[0], key=len)
    assert "".join(piece.text for piece in whole) == "".join(piece.text for piece in pieces) == expected
    assert once.tokens == cut.tokens
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert entries == [entry for piece in whole for entry in piece.logprobs]
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)
    assert [piece.finish for piece in pieces if piece.finish] == [FinishReason.STOP]
    assert pieces[-1].stop == whole[-1].stop
    if expected == text:
        assert cut.whole_answer() == tokens[:-1]
    else:
        assert cut.whole_answer() is None


def test_repeats_are_dropped_and_gaps_refused() -> None:
    stream = ChoiceStream(0, TOKENIZER, OutputOptions(), (), (END_ID,))
    tokens = TOKENIZER.encode("Hello, world!")
    first = stream.feed(delta(0, tokens[:2]))
    again = stream.feed(delta(0, tokens[:3]))
    assert first is not None
    assert again is not None
    assert first.text + again.text == TOKENIZER.decode(tokens[:3])
    with pytest.raises(Internal, match="token 5 after 3"):
        stream.feed(delta(5, tokens[5:]))


def test_the_end_comes_once_and_late_deltas_bring_only_usage() -> None:
    stream = ChoiceStream(0, TOKENIZER, OutputOptions(stop=("lo",)), (), (END_ID,))
    tokens = TOKENIZER.encode("Hello, world!")
    piece = stream.feed(delta(0, tokens))
    assert piece is not None
    assert (piece.text, piece.stop) == ("Hel", "lo")
    assert stream.usage is None
    assert stream.feed(delta(len(tokens), [END_ID], FinishReason.STOP)) is None
    assert stream.usage == USAGE


def test_a_clients_own_stop_token_is_named_and_shown() -> None:
    comma = TOKENIZER.encode(",")[0]
    stream = ChoiceStream(0, TOKENIZER, OutputOptions(), (), (END_ID,))
    piece = stream.feed(delta(0, [*TOKENIZER.encode("Hello"), comma], FinishReason.STOP))
    assert piece is not None
    assert (piece.text, piece.stop) == ("Hello,", comma)


@pytest.mark.parametrize("finish", [FinishReason.ERROR, FinishReason.CANCELLED])
def test_ends_that_are_no_success_carry_an_error(finish: FinishReason) -> None:
    stream = ChoiceStream(0, TOKENIZER, OutputOptions(), (), (END_ID,))
    piece = stream.feed(delta(0, [], finish))
    assert piece is not None
    assert piece.error


def test_prompt_logprobs_survive_a_stop_string_in_the_first_delta() -> None:
    stream = ChoiceStream(0, TOKENIZER, OutputOptions(stop=("H",)), (), (END_ID,))
    asked = replace(delta(0, TOKENIZER.encode("Hello")), prompt_logprobs=(None, TokenLogprob(1, -1.0)))
    piece = stream.feed(asked)
    assert piece is not None
    assert piece.finish is FinishReason.STOP
    assert piece.prompt_logprobs == asked.prompt_logprobs
