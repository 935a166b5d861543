"""Nodes of the prefix cache's radix tree, and comparisons of token runs.

Token runs are packed as 4 bytes a token, so that comparing, slicing and hashing them runs in C at memory speed: looking
up a prompt of thousands of tokens costs microseconds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tandem.kv import BlockHash

TOKEN_BYTES = 4
"""Bytes of a packed token."""

NO_PAGE = -1
"""Stands for a page that a layer group with a window does not have."""

Pages: TypeAlias = Sequence[Sequence[int]]
"""Page numbers per layer group, in token order; `NO_PAGE` where a group with a window has none."""

_CODE = next(code for code in "IL" if array(code).itemsize == TOKEN_BYTES)


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as native unsigned 32-bit numbers. Raises OverflowError on an id that is none."""
    return array(_CODE, tokens).tobytes()


def unpack(packed: bytes) -> list[int]:
    """The inverse of `pack`."""
    tokens = array(_CODE)
    tokens.frombytes(packed)
    return tokens.tolist()


def common_bytes(left: bytes, right: bytes) -> int:
    """Length of the common prefix. Halving with slices: each comparison is one memcmp."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True, eq=False)
class Node:
    """A run of whole pages after its parent's. `eq=False`: a node is itself, and can be a dictionary's key."""

    parent: Node | None
    """None for a root, and for a node that was evicted."""
    depth: int
    """Tokens before `key`."""
    key: bytes = b""
    """Packed tokens of `pages`."""
    pages: list[list[int]] = field(default_factory=list)
    """Per layer group, equally many; a group with a window may have none in places."""
    refs: int = 0
    """Handles on this node or below it."""
    last_used: int = 0
    """Tick of the last release: the least goes first."""
    hashes: list[BlockHash] = field(default_factory=list)
    """Hashes of the blocks that end in `key`, as far as they were announced."""
    children: dict[bytes, Node] = field(default_factory=dict)
    """By their first page's packed tokens."""
    _firsts: list[bytes] = field(default_factory=list)
    """Sorted keys of `children`: the longest common prefix with any page is found beside its place."""

    @property
    def num_pages(self) -> int:
        """Pages of each group, missing ones included."""
        return len(self.pages[0])

    @property
    def num_tokens(self) -> int:
        """Tokens of `key`."""
        return len(self.key) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """Tokens from the root to the last of `key`."""
        return self.depth + self.num_tokens

    def attach(self, first_page: bytes, child: Node) -> None:
        """Makes `child` a child, in place of one with the same first page."""
        if first_page not in self.children:
            insort(self._firsts, first_page)
        self.children[first_page] = child
        child.parent = self

    def detach(self, first_page: bytes) -> None:
        """Removes a child and marks it as evicted."""
        self.children.pop(first_page).parent = None
        del self._firsts[bisect_left(self._firsts, first_page)]

    def nearest(self, run: bytes) -> tuple[Node | None, int]:
        """The child whose first page shares most tokens with `run`, and how many; (None, 0) when none shares any.

        In sorted order, the longest common prefix is with one of the two neighbours.
        """
        place = bisect_left(self._firsts, run)
        best: Node | None = None
        most = 0
        for first in self._firsts[max(place - 1, 0) : place + 1]:
            shared = common_bytes(first, run) // TOKEN_BYTES
            if shared > most:
                best, most = self.children[first], shared
        return best, most

    def walk(self) -> Iterator[Node]:
        """The node and all below it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_children(self, page_bytes: int) -> None:
        """Raises AssertionError when children and their index disagree."""
        assert self._firsts == sorted(self.children)
        for first, child in self.children.items():
            assert child.parent is self
            assert (child.depth, child.key[:page_bytes]) == (self.end, first)
        assert self.refs >= sum(child.refs for child in self.children.values())
