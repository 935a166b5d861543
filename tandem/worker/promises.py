"""Blocks that requests under way will leave in the cache, as routers are told: promised, and taken back by the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tandem.cluster import CacheEvent, EventKind
from tandem.kv import BlockHash

Announce = Callable[[tuple[CacheEvent, ...]], None]


class Promises:
    """Which requests promise which blocks.

    A block is taken back when nobody who promised it is left, however they ended: what was stored stays known, and
    what came and went between two of the engine's reports is in neither of them. Routers hear of it after the report
    that tells what the requests stored, so that no block is unknown in between: `seal` before the engine is asked,
    `taken_back` behind what it said.
    """

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._made: dict[str, tuple[BlockHash, ...]] = {}
        self._counts: Counter[BlockHash] = Counter()
        self._ended: dict[BlockHash, None] = {}
        self._sealed: dict[BlockHash, None] = {}

    def make(self, name: str, hashes: tuple[BlockHash, ...]) -> None:
        """A request promises blocks from the root on; it must not have promised any."""
        if hashes:
            self._made[name] = hashes
            self._counts.update(hashes)
            for block in hashes:
                self._ended.pop(block, None)
                self._sealed.pop(block, None)
            self._announce((CacheEvent(EventKind.PROMISED, hashes),))

    def end(self, name: str) -> None:
        """The request has ended, in whatever way; nothing if it promised nothing."""
        hashes = self._made.pop(name, ())
        self._counts.subtract(hashes)
        for block in hashes:
            if not self._counts[block]:
                del self._counts[block]
                self._ended[block] = None

    def made(self) -> tuple[CacheEvent, ...]:
        """All that are open, for a router that comes later."""
        return tuple(CacheEvent(EventKind.PROMISED, hashes) for hashes in self._made.values())

    def seal(self) -> None:
        """What the requests that ended so far stored is in the report that is asked for next."""
        self._sealed |= self._ended
        self._ended.clear()

    def taken_back(self) -> tuple[CacheEvent, ...]:
        """To be told behind the report before which it was sealed, but for what was promised again since."""
        sealed = tuple(self._sealed)
        self._sealed.clear()
        return (CacheEvent(EventKind.WITHDRAWN, sealed),) if sealed else ()

    def check_integrity(self) -> None:
        """Raises AssertionError when the counts are not those of the promises."""
        assert self._counts == Counter(block for hashes in self._made.values() for block in hashes)
        assert not self._counts.keys() & (self._ended.keys() | self._sealed.keys()), "promised and taken back"

    def leaks(self) -> list[str]:
        """Requests whose promise has not ended."""
        return [f"{name} promises {len(hashes)} blocks" for name, hashes in self._made.items()]
