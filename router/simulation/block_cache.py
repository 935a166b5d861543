"""A simulated worker's prefix cache: whole blocks, least recently used leaf evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tandem.kv import BlockHash


class BlockCache:
    """Blocks in use, and at most `idle_blocks` that nobody uses. Prefixes are whole: no block without its parent.

    Those in use come on top of the bound: memory for sequences under way is counted elsewhere.
    """

    def __init__(self, idle_blocks: int) -> None:
        self._idle_blocks = idle_blocks
        self._users: dict[BlockHash, int] = {}
        # Least recently used first; a block always comes after those that follow it, so the first is a leaf.
        self._idle: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._users) + len(self._idle)

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._users or block in self._idle

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many blocks at the front are held."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in self:
                low = middle + 1
            else:
                high = middle
        return low

    def acquire(self, hashes: Sequence[BlockHash]) -> int:
        """Takes what is held of the front into use; returns how many blocks."""
        held = self.match(hashes)
        self.store(hashes[:held])
        return held

    def store(self, hashes: Sequence[BlockHash]) -> tuple[BlockHash, ...]:
        """Takes blocks into use, whose predecessors are in use; returns those that were not held before."""
        fresh = []
        for block in hashes:
            users = self._users.get(block, 0)
            if not users:
                if block in self._idle:
                    del self._idle[block]
                else:
                    fresh.append(block)
            self._users[block] = users + 1
        return tuple(fresh)

    def release(self, hashes: Sequence[BlockHash]) -> tuple[BlockHash, ...]:
        """Ends one use of each block, given from the front of a prompt; returns what is evicted for it."""
        for block in reversed(hashes):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None
        excess = len(self._idle) - self._idle_blocks
        return tuple(self._idle.popitem(last=False)[0] for _ in range(excess))

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        assert len(self._idle) <= self._idle_blocks
        assert all(count > 0 for count in self._users.values())
        assert self._users.keys().isdisjoint(self._idle)
