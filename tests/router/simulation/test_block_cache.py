"""The simulated cache against a naive tree that is searched and sorted each time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.simulation.block_cache import BlockCache

PROMPTS = st.lists(st.integers(0, 2), min_size=0, max_size=5)
"""A path in a tree of three branches a node: every prefix is a block's name."""


def blocks(path: list[int]) -> tuple[bytes, ...]:
    return tuple(bytes(path[: end + 1]) for end in range(len(path)))


class NaiveCache:
    """Blocks with their users and the time of their last use; evicts the oldest leaf, one at a time."""

    def __init__(self, idle: int) -> None:
        self.idle = idle
        self.users: dict[bytes, int] = {}
        self.used: dict[bytes, int] = {}
        self.time = 0

    def match(self, path: tuple[bytes, ...]) -> int:
        count = 0
        while count < len(path) and path[count] in self.users:
            count += 1
        return count

    def store(self, path: tuple[bytes, ...]) -> None:
        for block in path:
            self.users[block] = self.users.get(block, 0) + 1

    def release(self, path: tuple[bytes, ...]) -> set[bytes]:
        self.time += 1
        for block in path:
            self.users[block] -= 1
            self.used[block] = self.time
        gone = set()
        while sum(not count for count in self.users.values()) > self.idle:
            leaves = [
                block
                for block, count in self.users.items()
                if not count and not any(other != block and other.startswith(block) for other in self.users)
            ]
            # Of one use, the deepest was let go first.
            oldest = min(leaves, key=lambda block: (self.used[block], -len(block)))
            del self.users[oldest]
            gone.add(oldest)
        return gone


@settings(max_examples=150)
@given(st.integers(0, 6), st.lists(st.tuples(PROMPTS, st.booleans()), max_size=30))
def test_it_holds_and_evicts_what_the_naive_one_does(idle: int, steps: list[tuple[list[int], bool]]) -> None:
    gone: list[bytes] = []
    cache, naive = BlockCache(idle, gone.extend), NaiveCache(idle)
    under_way: list[tuple[bytes, ...]] = []
    for path, let_go in steps:
        wanted = blocks(path)
        assert cache.match(wanted) == naive.match(wanted)
        known = cache.acquire(wanted)
        fresh = cache.store(wanted[known:])
        assert fresh == wanted[known:]
        naive.store(wanted)
        under_way.append(wanted)
        if let_go:
            ended = under_way.pop(0)
            gone.clear()
            cache.release(ended)
            assert set(gone) == naive.release(ended)
        cache.check_integrity()
        assert len(cache) == len(naive.users)
        assert all(block in cache for block in naive.users)


def test_what_is_in_use_is_never_evicted() -> None:
    gone: list[bytes] = []
    cache = BlockCache(1, gone.extend)
    long, other = blocks([0, 0, 0]), blocks([1, 1])
    cache.store(long)
    cache.store(other)
    cache.release(other)
    assert gone == [other[1]]
    assert cache.match(long) == 3 and cache.match(other) == 1
    assert cache.acquire(long) == 3
    gone.clear()
    cache.release(long)
    assert gone == []
    cache.release(long)
    assert gone == [other[0], long[2], long[1]]
    assert cache.match(long) == 1
