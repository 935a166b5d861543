"""A simulated worker's prefix cache: whole blocks, least recently used leaf evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from tandem.kv import BlockHash


class BlockCache:
    """Blocks in use, and at most `idle_blocks` that nobody uses. Prefixes are whole: no block without its parent.

    Those in use come on top of the bound: memory for sequences under way is counted elsewhere. Unless there is a pool,
    out of which all of it comes: then blocks in use and reserved ones leave less to those that nobody uses.
    """

    def __init__(
        self, idle_blocks: int, on_evict: Callable[[tuple[BlockHash, ...]], None], pool_blocks: int = 0
    ) -> None:
        """on_evict: told of blocks, leaf first, as soon as they are gone. pool_blocks: 0 is no pool."""
        self._idle_blocks = idle_blocks
        self._on_evict = on_evict
        self._pool_blocks = pool_blocks
        self._reserved = 0
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
        """Takes blocks into use, whose predecessors are in use; returns those that were not held before.

        What is evicted for them is told before.
        """
        fresh = []
        for block in hashes:
            users = self._users.get(block, 0)
            if not users:
                if block in self._idle:
                    del self._idle[block]
                else:
                    fresh.append(block)
            self._users[block] = users + 1
        if fresh:
            self._evict()
        return tuple(fresh)

    def reserve(self, blocks: int) -> None:
        """Memory for what is not in the cache, or not yet; negative gives it back."""
        self._reserved += blocks
        self._evict()

    def release(self, hashes: Sequence[BlockHash]) -> None:
        """Ends one use of each block, given from the front of a prompt."""
        for block in reversed(hashes):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None
        self._evict()

    def _evict(self) -> None:
        excess = len(self._idle) - self._bound()
        if excess > 0:
            self._on_evict(tuple(self._idle.popitem(last=False)[0] for _ in range(excess)))

    def _bound(self) -> int:
        if not self._pool_blocks:
            return self._idle_blocks
        return max(self._pool_blocks - len(self._users) - self._reserved, 0)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        assert len(self._idle) <= self._bound()
        assert self._reserved >= 0
        assert all(count > 0 for count in self._users.values())
        assert self._users.keys().isdisjoint(self._idle)
