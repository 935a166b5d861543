"""Pages of layer groups with a window: which of them a sequence needs, and those that the prefix cache has.

A position sees only `window` tokens back, so of such a group a sequence holds the pages at its end alone, and the cache
may give up a page in the middle of a path: `NO_PAGE` stands in its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tandem.engine.pages import PagePool
from tandem.engine.radix import NO_PAGE, Node
from tandem.kv import BLOCK_TOKENS, LayerGroup


def kept_from(group: LayerGroup, computed: int, page_size: int) -> int:
    """First page that a sequence with `computed` tokens keeps: what the end of its last whole page sees.

    That may be a page more than its next position needs. Without it, one in `page_size` sequences could not be found
    in the cache after its end: it is matched to whole pages.
    """
    return group.seen_from(computed // page_size * page_size) // page_size


def running_pages(group: LayerGroup, chunk: int, page_size: int) -> int | None:
    """Most pages of a group that a sequence holds while it computes up to `chunk` tokens a step; None: all it has."""
    if group.window is None:
        return None
    return -(-(group.window - 1) // page_size) - (-(chunk - 1) // page_size) + 1


def most_pages(group: LayerGroup, chunk: int, page_size: int) -> int | None:
    """Most pages of a group that a sequence ever holds, at either end of a hand-over included; None: all it has."""
    running = running_pages(group, chunk, page_size)
    if running is None or group.window is None:
        return None
    blocks = -(-(group.window - 1) // BLOCK_TOKENS) + 1
    return max(running, blocks * (BLOCK_TOKENS // page_size))


class CachedWindow:
    """The cached pages of one group with a window, each with its handles and the node that it is in.

    Pages without handle are in the order in which the last one was given back: the first goes first.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.num_pages = 0
        """Pages in the tree."""
        self._pool = pool
        self._page_size = page_size
        self._refs = [0] * pool.num_pages
        self._owners: list[Node | None] = [None] * pool.num_pages
        self._places = [0] * pool.num_pages
        """Pages before it on its path; splits do not change that."""
        self._loose: OrderedDict[int, None] = OrderedDict()

    @property
    def evictable(self) -> int:
        """Pages that no handle keeps."""
        return len(self._loose)

    def adopt(self, pages: Iterable[int], node: Node, place: int) -> None:
        """Takes pages, held once by who brings them, into `node` from its `place`-th on."""
        for number, page in enumerate(pages, node.depth // self._page_size + place):
            if page != NO_PAGE:
                self._refs[page], self._owners[page], self._places[page] = 1, node, number
                self.num_pages += 1

    def move(self, pages: Iterable[int], node: Node) -> None:
        """Pages of the tree are now in `node`."""
        for page in pages:
            if page != NO_PAGE:
                self._owners[page] = node

    def hold(self, pages: Iterable[int]) -> None:
        """One more handle on each."""
        for page in pages:
            if page != NO_PAGE:
                if self._refs[page] == 0:
                    del self._loose[page]
                self._refs[page] += 1

    def let_go(self, pages: Sequence[int]) -> None:
        """Gives handles back. Of pages let go together, the last goes first: the others still end a shorter prefix."""
        for page in reversed(pages):
            if page != NO_PAGE:
                assert self._refs[page] > 0, "a page was let go twice"
                self._refs[page] -= 1
                if self._refs[page] == 0:
                    self._loose[page] = None

    def merge(self, node: Node, kept: list[int], given: Sequence[int]) -> list[int]:
        """Pages of a sequence beside those that `node` has, `kept`, for the same tokens: one of each pair stays.

        Returns the sequence's pages, held once each.
        """
        owned = list(given)
        for place, page in enumerate(given):
            if page == NO_PAGE:
                continue
            if kept[place] == NO_PAGE:
                kept[place] = page
                self.adopt((page,), node, place)
            else:
                self._pool.free((page,))
                owned[place] = kept[place]
                self.hold((kept[place],))
        return owned

    def drop(self, pages: Iterable[int]) -> None:
        """Frees pages that are no more in the tree. None may have a handle."""
        for page in pages:
            if page != NO_PAGE:
                del self._loose[page]
                self._owners[page] = None
                self._pool.free((page,))
                self.num_pages -= 1

    def evict(self, group: int) -> Node | None:
        """Frees the page that nobody has used for longest; returns the node that lost it. group: this one's number."""
        page = next(iter(self._loose), None)
        node = None if page is None else self._owners[page]
        if page is None or node is None:
            return None
        node.pages[group][self._places[page] - node.depth // self._page_size] = NO_PAGE
        self.drop((page,))
        return node

    def refs(self, page: int) -> int:
        """Handles on a page, for checks."""
        return self._refs[page]

    def check_integrity(self, group: int, nodes: Iterable[Node]) -> None:
        """Raises AssertionError when pages, their nodes and their handles disagree."""
        owners = {page: node for node in nodes for page in node.pages[group] if page != NO_PAGE}
        assert len(owners) == self.num_pages, "a page with a window is in the tree twice, or was miscounted"
        assert set(owners) <= self._pool.used(), "a cached page with a window is free"
        assert set(self._loose) == {page for page in owners if not self._refs[page]}
        for page, node in owners.items():
            assert self._owners[page] is node
            assert node.pages[group][self._places[page] - node.depth // self._page_size] == page
