"""Token ids to text, a few at a time, such that the pieces concatenate to what decoding them all at once gives.

What was given out never changes, and text is given out as soon as no token can change it; `decoders` lists what is
withheld until then, and how much that can be. Ids without a token, such as those of a padded vocabulary, are no text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tandem.text.byte_tokens import BYTE_TOKEN
from tandem.text.decoder_parser import Decoding
from tandem.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 8
"""Prompt tokens that a new detokeniser is shown; enough to tell a word's start from its inside."""


class IncrementalDetokenizer(Protocol):
    """State of one output stream. No piece ends inside a character."""

    def feed(self, token: int) -> str:
        """The text that is certain with `token`; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What is still withheld, incomplete characters as U+FFFD. The stream ends here."""
        ...

    @property
    def held(self) -> int:
        """Complete characters that are withheld: where the next token's text starts, counted from what was given."""
        ...

    @property
    def started(self) -> bool:
        """Whether a token came before, in the context or the stream: some decoders treat the first one otherwise."""
        ...


def detokenizer(
    tokenizer: Tokenizer,
    context: Sequence[int] = (),
    *,
    skip_special: bool = True,
    keep: frozenset[int] = frozenset(),
) -> IncrementalDetokenizer:
    """A detokeniser for text that follows the tokens `context` (the prompt's last ones).

    With a context, the text is what decoding context and tokens together gives, without what it has in common with the
    context's own text: a word keeps the space before it, and a character that the prompt began is given whole.
    skip_special: special tokens are no text, except those in `keep`.
    """
    hidden = tokenizer.special_ids - keep if skip_special else frozenset()
    if tokenizer.decoding is None:
        return WholeDetokenizer(tokenizer, hidden)
    if tokenizer.byte_level:
        return ByteLevelDetokenizer(tokenizer, hidden, context)
    return ChainDetokenizer(tokenizer, tokenizer.decoding, hidden, context)


class ByteLevelDetokenizer:
    """For byte-level BPE: an incremental UTF-8 decoder is all it takes."""

    held = 0
    started = True
    """Bytes are the same wherever they stand."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = False
        """Within a character, or before what the context's last one may still be."""
        self._known = ""
        for token in context:
            self.feed(token)
        if self._utf8.getstate()[0]:
            self._known, self._inside = "\ufffd", True

    def feed(self, token: int) -> str:
        """See `IncrementalDetokenizer`."""
        if token in self._hidden:
            return ""
        if not self._inside and (whole := self._tokenizer.whole_text(token)):
            return whole
        text = self._new(self._utf8.decode(self._tokenizer.token_bytes(token)))
        self._inside = bool(self._known or self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._new(self._utf8.decode(b"", final=True))

    def _new(self, text: str) -> str:
        if self._known:
            text, self._known = _without_known(text, self._known)
        return text


class ChainDetokenizer:
    """For every decoder that `decoders` knows."""

    def __init__(
        self, tokenizer: Tokenizer, decoding: Decoding, hidden: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._chain = decoding.start()
        self.started = False
        self._known = ""
        """The end of the context's text, as far as it is withheld: not part of the output."""
        if context:
            ended = decoding.start()
            for spelling in self._whole_characters(context, decoding):
                self.started = True
                self._chain.feed(spelling)
                ended.feed(spelling)
            self._known = "".join(ended.finish())

    @property
    def held(self) -> int:
        """See `IncrementalDetokenizer`."""
        return max(self._chain.held - len(self._known), 0)

    def feed(self, token: int) -> str:
        """See `IncrementalDetokenizer`."""
        spelling = self._spelling(token)
        if spelling is None:
            return ""
        self.started = True
        return self._new("".join(self._chain.feed(spelling)))

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._new("".join(self._chain.finish()))

    def _new(self, text: str) -> str:
        if self._known:
            text, self._known = _without_known(text, self._known)
        return text

    def _spelling(self, token: int) -> str | None:
        return None if token in self._hidden else self._tokenizer.token(token)

    def _whole_characters(self, context: Sequence[int], decoding: Decoding) -> list[str]:
        """Spellings of the context's tokens, without the rest of a character whose start was cut off."""
        spellings = [spelling for token in context if (spelling := self._spelling(token)) is not None]
        if decoding.byte_fallback:
            while spellings and (match := BYTE_TOKEN.fullmatch(spellings[0])) and 0x80 <= int(match[1], 16) < 0xC0:
                del spellings[0]
        return spellings


class WholeDetokenizer:
    """For decoders that judge a text as a whole: nothing is certain, and nothing given out, before the end."""

    held = 0

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._tokens: list[int] = []
        self.started = True

    def feed(self, token: int) -> str:
        """See `IncrementalDetokenizer`."""
        if token not in self._hidden:
            self._tokens.append(token)
        return ""

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._tokenizer.decode(self._tokens, skip_special_tokens=False)


def _without_known(text: str, known: str) -> tuple[str, str]:
    """`text` without what it has in common with `known` at its start, and what of `known` is still to be compared."""
    common = 0
    while common < min(len(text), len(known)) and text[common] == known[common]:
        common += 1
    return text[common:], known[common:] if common == len(text) else ""
