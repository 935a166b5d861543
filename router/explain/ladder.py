"""The hit ladder: of all prompt tokens that could be reused, where are those lost that were not?

Five sums over finished requests, each in tokens of whole blocks at the prompt's front (what cannot be named by a block
hash cannot be routed by either; the last prompt token is never cached and never counted):

- `prompt`: all such tokens, the whole that the others are shares of;
- `ideal`: those that an infinite cache shared by all workers would have had, because an earlier prompt or answer of the
  same root began with them. "Infinite" is bounded here: `max_blocks` blocks, each kept `max_age_s` after its last use;
- `capacity`: those that one cache shared by all, as large as all workers' KV pages together and evicting the least
  recently used block first, would have had. What is lost from `ideal` to here, more memory would bring;
- `perfect_routing`: the longest prefix that any single worker was believed to have when the request was planned. What
  is lost from `capacity` to here, is lost to copies of the same blocks on several workers, and to blocks that are
  there but not on one worker;
- `achieved`: what workers reported as not computed again. What is lost from `perfect_routing` to here, was given up by
  the policy for a shorter wait, or was not there (any more) when the request came.

A request counts when it ends with the worker's own counts, on all rungs at once, so the rungs are comparable. The order
of the rungs is usual, not guaranteed: a prefix stored while a request waited makes `achieved` exceed `perfect_routing`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tandem.kv import BLOCK_TOKENS, BlockHash, block_hashes
from tandem.types import TokenIds, Usage


@dataclass(frozen=True, slots=True)
class Rungs:
    """Tokens on each rung; see the module."""

    prompt: int = 0
    ideal: int = 0
    capacity: int = 0
    perfect_routing: int = 0
    achieved: int = 0

    def __add__(self, other: Rungs) -> Rungs:
        return Rungs(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


RUNGS = tuple(field.name for field in fields(Rungs))


class BlockCache:
    """A cache of block hashes only, evicting the least recently used; of a prompt's blocks the last one goes first."""

    def __init__(self) -> None:
        self._used: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def match(self, keys: Sequence[int]) -> int:
        """How many of the first blocks are here."""
        for count, key in enumerate(keys):
            if key not in self._used:
                return count
        return len(keys)

    def touch(self, keys: Sequence[int], now: float) -> None:
        """Stores what is not here, and makes all of it the most recently used."""
        for key in reversed(keys):
            self._used[key] = now
            self._used.move_to_end(key)

    def shrink(self, blocks: int, used_since: float) -> None:
        """Evicts until at most `blocks` are left, and whatever was last used before `used_since`."""
        while self._used and (len(self._used) > blocks or next(iter(self._used.values())) < used_since):
            self._used.popitem(last=False)


class HitLadder:
    """Computes the ladder as requests come; see the module.

    max_blocks: blocks remembered, about 350 bytes each; 0 computes no ladder. max_age_s: seconds a block is remembered
    after its last use. clock: seconds, monotonic.
    """

    def __init__(self, max_blocks: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_blocks = max_blocks
        self._max_age_s = max_age_s
        self._clock = clock
        self._ideal = BlockCache()
        self._capacity = BlockCache()
        self.total = Rungs()

    @property
    def on(self) -> bool:
        """Whether a ladder is computed."""
        return self._max_blocks > 0

    def planned(self, hashes: Sequence[BlockHash], prompt_tokens: int, best_match: int, capacity: int) -> Rungs:
        """A request's rungs but the last; its blocks are known from now on. Once a request.

        best_match: tokens that some worker was believed to have. capacity: tokens that all workers' pages hold.
        """
        keys = _keys(hashes[: (prompt_tokens - 1) // BLOCK_TOKENS])
        found = Rungs(
            prompt=len(keys) * BLOCK_TOKENS,
            ideal=self._ideal.match(keys) * BLOCK_TOKENS,
            capacity=self._capacity.match(keys) * BLOCK_TOKENS,
            perfect_routing=_whole(best_match, len(keys)),
        )
        self.stored(hashes, capacity)
        return found

    def stored(self, hashes: Sequence[BlockHash], capacity: int) -> None:
        """Blocks, consecutive from the root or from known ones, that workers compute or have computed."""
        keys, now = _keys(hashes), self._clock()
        since = now - self._max_age_s
        self._ideal.touch(keys, now)
        self._ideal.shrink(self._max_blocks, since)
        self._capacity.touch(keys, now)
        self._capacity.shrink(min(capacity // BLOCK_TOKENS, self._max_blocks), since)

    def ended(self, planned: Rungs, cached_tokens: int) -> None:
        """The request has ended, and a worker reported so many prompt tokens as not computed again."""
        achieved = _whole(cached_tokens, planned.prompt // BLOCK_TOKENS)
        self.total += Rungs(planned.prompt, planned.ideal, planned.capacity, planned.perfect_routing, achieved)

    def answered(
        self,
        planned: Rungs | None,
        usage: Usage | None,
        root: bytes,
        hashes: Sequence[BlockHash],
        behind: Sequence[TokenIds],
        capacity: int,
    ) -> None:
        """Puts a request that has ended on the ladder, and its answer among what could be reused.

        planned, usage: None where it was not planned or nothing came of it. root, hashes: of its prompt's hash chain.
        behind: what each choice has KV of behind those blocks. capacity: tokens that all workers' pages hold.
        """
        if planned is None or usage is None:
            return
        self.ended(planned, usage.cached_tokens)
        for tokens in behind:
            self.stored(block_hashes(root, tokens, parent=hashes[-1] if hashes else b""), capacity)

    def collect(self) -> Iterable[Metric]:
        """For Prometheus."""
        tokens = CounterMetricFamily(
            "tandem_hit_ladder_tokens", "Prompt tokens that could be, and were, reused", labels=("rung",)
        )
        for name, value in zip(RUNGS, astuple(self.total), strict=True):
            tokens.add_metric([name], value)
        blocks = GaugeMetricFamily(
            "tandem_hit_ladder_blocks",
            "Blocks that the ideal cache of the ladder knows",
            value=len(self._ideal),
        )
        return [tokens, blocks]

    def check_integrity(self) -> None:
        """Raises AssertionError when a bound or the order of the first rungs is broken; for tests."""
        assert len(self._capacity) <= max(len(self._ideal), 0)
        assert len(self._ideal) <= self._max_blocks
        total = self.total
        assert total.prompt >= total.ideal >= total.capacity >= 0
        assert total.prompt >= total.perfect_routing >= 0
        assert total.prompt >= total.achieved >= 0


def _keys(hashes: Sequence[BlockHash]) -> list[int]:
    """Half of each hash as a number: smaller than bytes, and still as good as unique among millions."""
    return [int.from_bytes(block[:8], "little") for block in hashes]


def _whole(tokens: int, most: int) -> int:
    return min(tokens // BLOCK_TOKENS, most) * BLOCK_TOKENS
