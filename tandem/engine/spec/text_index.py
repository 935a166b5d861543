"""Where runs of tokens occurred last in a text that grows: what prompt lookup and n-gram drafting search.

Hashed n-grams of a few lengths, the last occurrence of each in one table of fixed entries, checked against the text
itself. A whole prompt is entered at once by array operations; one more token costs a few hash steps, and so does a
search. Memory: 4 bytes a token for the text, and 16 to 64 for the table.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LENGTHS = (3, 5, 8, 16)
"""Tokens of the n-grams that are entered; the longest that is found counts."""
BREAK = -1
"""Stands between two texts in one index: no token, so that no n-gram with it is ever looked for."""
_FACTOR = 0x9E3779B1
_WORD = (1 << 32) - 1
_LEAST = 4096


class TextIndex:
    """A text of token ids, and the ends of its n-grams by their hash."""

    def __init__(self, expected: int = 0) -> None:
        """expected: tokens that it will hold; more make it grow."""
        self._text = array("i")
        self._entered = 0
        """N-grams that end at this token or before are in the table."""
        self._table = array("i")
        self._resize(expected)

    def __len__(self) -> int:
        return len(self._text)

    def _resize(self, tokens: int) -> None:
        """A new table for so many tokens, with nothing in it. Of two n-grams with one entry, the later one has it."""
        size = _LEAST
        while size < 8 * tokens:
            size *= 2
        self._table = array("i", bytes(4 * size))
        self._mask = size - 1
        self._entered = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds to the text's end."""
        self._text.extend(tokens)
        if 4 * len(self._text) > len(self._table):
            self._resize(2 * len(self._text))
        self._enter()

    def _enter(self) -> None:
        """Enters the n-grams that some token follows: what comes behind the text's last is not known yet."""
        first, end = self._entered + 1, len(self._text)
        if end - first > 32:
            self._enter_many(first, end)
        else:
            for at in range(first, end):
                if self._text[at] != BREAK:
                    for slot in self._slots(self._text, at):
                        self._table[slot] = at
        self._entered = max(end - 1, self._entered)

    def _slots(self, text: Sequence[int], end: int) -> list[int]:
        """The table's entries for the n-grams before `end`, shortest first. A key goes on from that of the shorter."""
        slots, key, place, mask = [], 0, end, self._mask
        for length in LENGTHS:
            if length > end:
                break
            while place > end - length:
                place -= 1
                key = (key * _FACTOR + text[place] + 1) & _WORD
            slots.append(((key * _FACTOR + length) & _WORD) >> 8 & mask)
        return slots

    def _enter_many(self, first: int, end: int) -> None:
        words = np.frombuffer(self._text, dtype=np.int32)
        text = words[max(first - LENGTHS[-1], 0) : end - 1].astype(np.uint64) + np.uint64(1)
        before, factor, word = end - 1 - len(text), np.uint64(_FACTOR), np.uint64(_WORD)
        table: NDArray[np.int32] = np.frombuffer(self._table, dtype=np.int32)
        keys, done = np.zeros(len(text), dtype=np.uint64), 0  # by where an n-gram ends
        for length in LENGTHS:
            for place in range(done, length):
                keys[place:] = (keys[place:] * factor + text[: len(text) - place]) & word
            done = length
            ends = np.arange(before + length, before + len(text) + 1)
            fresh = (ends >= first) & (words[ends] != BREAK)
            slots = (keys[length - 1 :] * factor + np.uint64(length) & word) >> np.uint64(8) & np.uint64(self._mask)
            # Where an entry is assigned twice, numpy keeps the last.
            table[slots[fresh]] = ends[fresh]

    def find(self, tail: Sequence[int], limit: int) -> tuple[int, list[int]]:
        """What followed the longest n-gram at the end of `tail` where that occurred last, at most `limit` tokens.

        Returns the n-gram's length with it; (0, []) when none occurred. A continuation that reaches the text's end goes
        on as it began, which is right where the text repeats itself.
        """
        text = self._text
        slots = self._slots(tail, len(tail))
        for length, slot in zip(reversed(LENGTHS[: len(slots)]), reversed(slots), strict=True):
            end = self._table[slot]
            if end >= length and text[end - length : end].tolist() == list(tail[len(tail) - length :]):
                found = text[end : end + limit].tolist()
                if BREAK in found:
                    return length, found[: found.index(BREAK)]
                period = len(found)
                while period and len(found) < limit:
                    found.append(found[len(found) - period])
                return length, found
        return 0, []
