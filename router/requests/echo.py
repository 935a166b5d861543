"""The prompt as a completion repeats it (`echo`): its text, and where each of its tokens stands in it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.text.detokenizer import detokenizer
from tandem.text.tokenizer import Tokenizer

MANY_TOKENS = 2048
"""Prompts from here on are worked on in a thread."""


@dataclass(frozen=True, slots=True)
class Echo:
    """What each choice of one prompt starts with."""

    text: str = ""
    offsets: tuple[int, ...] | None = None
    """Where each prompt token's text begins, in characters; None unless log-probabilities go with the echo."""


async def echo_of(given: str | Sequence[int], ids: Sequence[int], tokenizer: Tokenizer, places: bool) -> Echo:
    """The echo of a prompt that came as text or ids, and is `ids` after tokenising. places: whether to find offsets."""

    def make() -> Echo:
        text = given if isinstance(given, str) else tokenizer.decode(ids)
        return Echo(text, token_offsets(text, ids, tokenizer) if places else None)

    return await asyncio.to_thread(make) if len(ids) >= MANY_TOKENS else make()


def token_offsets(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Where each id's text begins in `text`, never behind its end.

    A special token takes up room only where the text spells it out: those that the tokeniser puts in front do not.
    """
    pieces = detokenizer(tokenizer)
    offsets, position = [], 0
    for token in ids:
        offsets.append(min(position + pieces.held, len(text)))
        if token in tokenizer.special_ids:
            spelling = tokenizer.token(token) or ""
            position += len(spelling) if spelling and text.startswith(spelling, position) else 0
        else:
            position += len(pieces.feed(token))
    return tuple(offsets)
