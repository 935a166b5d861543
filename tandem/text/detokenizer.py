"""Token ids to text, a few at a time, such that the pieces concatenate to what decoding them all at once gives."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tandem.text.tokenizer import BYTE_TOKEN, Tokenizer

CONTEXT_TOKENS = 8
"""Prompt tokens that a new detokeniser is shown; enough to tell a word's start from its inside."""


class IncrementalDetokenizer(Protocol):
    """State of one output stream. Special tokens are skipped; no piece ends inside a character."""

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What is still held back, incomplete characters as U+FFFD. The stream ends here."""
        ...


def detokenizer(tokenizer: Tokenizer, context: Sequence[int] = ()) -> IncrementalDetokenizer:
    """A detokeniser for text that follows the tokens `context` (the prompt's last ones)."""
    if tokenizer.byte_level:
        return ByteLevelDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer, context)


class ByteLevelDetokenizer:
    """For byte-level BPE: each token is bytes, so an incremental UTF-8 decoder is all it takes; O(1) a token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """See `IncrementalDetokenizer`."""
        if token in self._tokenizer.special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder, sentencepiece's above all: decodes the last tokens with and without the new ones.

    A run of byte tokens is held back until it ends, because decoders judge it as a whole: one bad byte turns
    the whole run into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = self._visible(context[-CONTEXT_TOKENS:])
        self._window_text = tokenizer.decode(self._window)
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """See `IncrementalDetokenizer`."""
        visible = self._visible((token,))
        if not visible:
            return ""
        self._pending += visible
        spelling = self._tokenizer.token(token)
        if spelling is not None and BYTE_TOKEN.fullmatch(spelling):
            return ""
        return self._flush()

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._flush()

    def _flush(self) -> str:
        if not self._pending:
            return ""
        text = self._tokenizer.decode(self._window + self._pending)
        piece = text[len(self._window_text) :]
        if piece:
            self._window, self._pending = self._pending, []
            self._window_text = self._tokenizer.decode(self._window)
        return piece

    def _visible(self, tokens: Sequence[int]) -> list[int]:
        """Without special tokens and ids that have no token: decoders drop both before they look at neighbours."""
        known = (token for token in tokens if token not in self._tokenizer.special_ids)
        return [token for token in known if self._tokenizer.token(token) is not None]
