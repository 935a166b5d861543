"""What conversations were tokenised to before, by their text: so that the next turn tokenises only what is new.

Answers are remembered with the ids that the model sampled. Their text, tokenised again, gives other ids more often than
not, and then no prefix cache would know the conversation. Texts are cut only after end-of-turn tokens: tokenisers
split text at special tokens before anything else, so what follows one is tokenised independently of what precedes it.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.types import TokenIds

MAX_BOUNDARIES = 1024
"""Ends of turns that are looked at in one text, the last ones; a bound on the work that a text can cause."""
DEFAULT_TURN_BYTES = 64 << 20
ENTRY_BYTES = 400
"""Memory that an entry takes beside its ids: dictionary slots, key and object."""


@dataclass(eq=False, slots=True)
class Turn:
    """Text up to an end of turn, as the ids that follow those of `parent`, the same text up to an earlier end."""

    key: bytes
    parent: Turn | None
    ids: array[int]
    """The ids after the parent's, 4 bytes each."""
    length: int = field(init=False)
    """Ids in all."""
    children: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.length = len(self.ids) + (self.parent.length if self.parent else 0)

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return len(self.ids) * self.ids.itemsize + ENTRY_BYTES

    def all_ids(self) -> list[int]:
        """The ids from the text's start."""
        parts: list[array[int]] = []
        turn: Turn | None = self
        while turn is not None:
            parts.append(turn.ids)
            turn = turn.parent
        return [token for part in reversed(parts) for token in part]


class Boundary(NamedTuple):
    """An end of turn in a text."""

    position: int
    """Characters up to and including the end-of-turn token."""
    key: bytes
    """Names the salt and the text up to there."""


class Boundaries:
    """The ends of turns in one text, hashed in one pass; `extended` goes on from the text's end."""

    def __init__(self, text: str, end: str, salt: str) -> None:
        """end: text of the end-of-turn token. Keys under different salts never meet."""
        positions: list[int] = []
        found = text.rfind(end)
        while found >= 0 and len(positions) < MAX_BOUNDARIES:
            positions.append(found + len(end))
            found = text.rfind(end, 0, found)
        state = hashlib.blake2b(digest_size=16, person=b"tandem-turns-v1")
        salted = salt.encode()
        state.update(struct.pack("<I", len(salted)) + salted)
        self.found: list[Boundary] = []
        start = 0
        for position in reversed(positions):
            state.update(text[start:position].encode())
            self.found.append(Boundary(position, state.copy().digest()))
            start = position
        state.update(text[start:].encode())
        self._state = state

    def extended(self, more: str) -> bytes:
        """The key of the whole text followed by `more`."""
        state = self._state.copy()
        state.update(more.encode())
        return state.digest()


class TurnCache:
    """A bounded LRU of turns. A turn is never older than its children, so evicting the oldest evicts leaves first."""

    def __init__(self, max_bytes: int = DEFAULT_TURN_BYTES) -> None:
        """max_bytes: memory for ids and entries, approximately."""
        self._max_bytes = max_bytes
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def longest(self, boundaries: Sequence[Boundary]) -> tuple[Boundary, Turn] | None:
        """The last of the boundaries whose text is remembered."""
        for boundary in reversed(boundaries):
            turn = self._turns.get(boundary.key)
            if turn is not None:
                self._touch(turn)
                return boundary, turn
        return None

    def add(
        self, key: bytes, ids: TokenIds, end: int, after: tuple[Turn, int] | None, more: Sequence[int] = ()
    ) -> Turn:
        """Remembers that the text named by `key` is `ids[:end]` and `more`; returns its turn.

        after: a turn at an earlier end in that text, and the number of ids up to there. What is remembered already
        stays as it is. A turn that is too large for the cache is returned but not kept.
        """
        known = self._turns.get(key)
        if known is not None:
            self._touch(known)
            return known
        parent, start = after if after is not None else (None, 0)
        if parent is not None and self._turns.get(parent.key) is not parent:  # evicted since it was found
            parent, start = None, 0
        turn = Turn(key, parent, array("I", (*ids[start:end], *more)))
        if turn.size > self._max_bytes // 4:
            return turn
        self._turns[key] = turn
        self._bytes += turn.size
        if parent is not None:
            parent.children += 1
        self._touch(turn)
        while self._bytes > self._max_bytes:
            self._evict()
        return turn

    def _touch(self, turn: Turn | None) -> None:
        while turn is not None:
            self._turns.move_to_end(turn.key)
            turn = turn.parent

    def _evict(self) -> None:
        _, turn = self._turns.popitem(last=False)
        self._bytes -= turn.size
        if turn.parent is not None:
            turn.parent.children -= 1

    def check_integrity(self) -> None:
        """Asserts what holds between calls; for tests."""
        assert self._bytes == sum(turn.size for turn in self._turns.values()) <= self._max_bytes
        age = {key: rank for rank, key in enumerate(self._turns)}
        children = dict.fromkeys(self._turns, 0)
        for key, turn in self._turns.items():
            assert turn.key == key
            if turn.parent is not None:
                assert self._turns[turn.parent.key] is turn.parent
                assert age[key] < age[turn.parent.key]
                children[turn.parent.key] += 1
        assert all(turn.children == children[key] for key, turn in self._turns.items())
