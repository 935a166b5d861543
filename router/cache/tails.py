"""What finished requests left behind a worker's last whole block.

It is the router's own knowledge, since events speak of whole blocks only. Without it the second turn of a short
conversation could not be told from any other request, and would go anywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from router.open_request import Chain
from tandem.cluster import Incarnation
from tandem.kv import BLOCK_TOKENS, block_hashes
from tandem.types import TokenIds

AHEAD_OF_EVENTS_S = 2.0
"""So long a tail vouches for the blocks before it too: their events may still be on the way."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Tokens that a worker has after one block, fewer than a block."""

    worker: Incarnation
    tokens: TokenIds
    since: float


class TailMemory:
    """Tails by the hash of the block before them (the root's digest at the start). Bounded; the least recent go.

    clock: seconds, monotonic.
    """

    def __init__(self, max_tails: int, clock: Callable[[], float]) -> None:
        self._max_tails = max_tails
        self._clock = clock
        self._tails: OrderedDict[tuple[bytes, Incarnation, int], Tail] = OrderedDict()
        self._by_start: dict[tuple[bytes, int], dict[tuple[bytes, Incarnation, int], None]] = {}
        """By parent and first token: many prompts may begin at one root, and one that differs at once says nothing."""

    def __len__(self) -> int:
        return len(self._tails)

    def remember(self, worker: Incarnation, chain: Chain, tokens: TokenIds) -> None:
        """A worker has the KV of the blocks that `chain` names and of `tokens` behind them."""
        parent = chain.hashes[-1] if chain.hashes else b""
        hashes = block_hashes(chain.root, tokens, parent=parent)
        last, rest = (hashes or [parent])[-1] or chain.root, tokens[len(hashes) * BLOCK_TOKENS :]
        self.add(worker, last, rest)
        if rest and last != chain.root:
            self.add(worker, last, ())  # for prompts that go on otherwise: the blocks are there all the same

    def add(self, worker: Incarnation, parent: bytes, tokens: TokenIds) -> None:
        """A worker has `tokens` after block `parent`. Tails with different first tokens are kept beside each other."""
        key = (parent, worker, tokens[0] if tokens else -1)
        self._forget(key)
        self._tails[key] = Tail(worker, tokens, self._clock())
        self._by_start.setdefault((parent, key[2]), {})[key] = None
        while len(self._tails) > self._max_tails:
            self._forget(next(iter(self._tails)))

    def extend(self, matches: Mapping[Incarnation, int], chain: Chain, prompt: TokenIds) -> dict[Incarnation, int]:
        """Tokens at the prompt's front that each worker has: what the index knows (blocks), and tails behind it."""
        tokens = {worker: blocks * BLOCK_TOKENS for worker, blocks in matches.items()}
        trusted_after = self._clock() - AHEAD_OF_EVENTS_S
        for blocks, parent in enumerate((chain.root, *chain.hashes)):
            start = blocks * BLOCK_TOKENS
            for first in (-1, *prompt[start : start + 1]):
                for tail in map(self._tails.__getitem__, self._by_start.get((parent, first), ())):
                    if tail.since >= trusted_after or matches.get(tail.worker, 0) >= blocks:
                        found = start + common_prefix(tail.tokens, prompt[start : start + len(tail.tokens)])
                        tokens[tail.worker] = max(tokens.get(tail.worker, 0), found)
        return tokens

    def drop(self, worker: Incarnation) -> None:
        """The worker is gone."""
        for key in [key for key, tail in self._tails.items() if tail.worker == worker]:
            self._forget(key)

    def _forget(self, key: tuple[bytes, Incarnation, int]) -> None:
        if self._tails.pop(key, None) is not None:
            siblings = self._by_start[key[0], key[2]]
            del siblings[key]
            if not siblings:
                del self._by_start[key[0], key[2]]

    def check_integrity(self) -> None:
        """Raises AssertionError when the two views differ or the bound is broken."""
        assert len(self._tails) <= self._max_tails
        assert {key for keys in self._by_start.values() for key in keys} == set(self._tails)
        assert all(self._by_start.values()), "an empty start is kept"


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
