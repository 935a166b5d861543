"""Which cached leaf goes next: the least recently used of the tenant that has more than its share, else of all.

Without shares, one tenant that floods the cache evicts what everybody else has (and learns from its own misses when
they come back). With a share, what it has beyond that goes before anything of others does.
"""

from __future__ import annotations

import heapq
from collections import Counter

from tandem.engine.radix import Node

SLACK = 64


class EvictionQueue:
    """Leaves that nobody holds. An entry is void when its node has changed since; that is found out when it is taken.

    share_pages: what one tenant may have cached before its own goes first.
    """

    def __init__(self, share_pages: float) -> None:
        self._share_pages = share_pages
        self._heaps: dict[str, list[tuple[int, int, Node]]] = {}
        self._pages: Counter[str] = Counter()
        self._serial = 0

    def count(self, owner: str, pages: int) -> None:
        """A tenant has so many pages more in the cache, or fewer."""
        self._pages[owner] += pages
        if not self._pages[owner]:
            del self._pages[owner]

    def offer(self, owner: str, node: Node) -> None:
        """A leaf may be evicted as of its last use."""
        self._serial += 1
        heap = self._heaps.setdefault(owner, [])
        heapq.heappush(heap, (node.last_used, self._serial, node))
        if len(heap) > SLACK + 2 * self._pages[owner]:
            heap[:] = [entry for entry in heap if _is_loose(entry)]
            heapq.heapify(heap)

    def take(self) -> Node | None:
        """The leaf to evict next; None when there is none. Offer it again if pages of it stay."""
        for owner, heap in list(self._heaps.items()):
            while heap and not _is_loose(heap[0]):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[owner]
        if not self._heaps:
            return None
        most = max(self._heaps, key=lambda owner: self._pages[owner])
        if self._pages[most] < self._share_pages:
            most = min(self._heaps, key=lambda owner: self._heaps[owner][0][:2])
        return heapq.heappop(self._heaps[most])[2]

    def nodes(self) -> set[Node]:
        """All leaves that could be taken."""
        return {entry[2] for heap in self._heaps.values() for entry in heap if _is_loose(entry)}

    def check_integrity(self, pages: dict[str, int]) -> None:
        """Raises AssertionError unless tenants have these many pages."""
        assert dict(self._pages) == {owner: count for owner, count in pages.items() if count}, "pages were miscounted"


def _is_loose(entry: tuple[int, int, Node]) -> bool:
    """Whether an entry still means an evictable leaf."""
    stamp, _, node = entry
    return node.parent is not None and not node.refs and not node.children and node.last_used == stamp
