"""How often prefixes are asked for, lately."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tandem.kv import BlockHash

TAU_S = 20.0
"""Time constant: an older request counts less."""
FORGET_S = 10 * TAU_S
"""A prefix that nobody has asked for so long is forgotten; a thousand requests would count as less than a tenth."""
EXACT = 16
"""Prefixes of up to so many blocks are told apart by one; longer ones by an eighth of their length, or less."""


@dataclass(slots=True)
class _Heat:
    count: float
    at: float


class PrefixHeat:
    """Counts requests by their prompts' prefixes. Bounded in number and by age; the least recently asked for go first.

    clock: seconds, monotonic.
    """

    def __init__(self, max_prefixes: int, clock: Callable[[], float]) -> None:
        self._max_prefixes = max_prefixes
        self._clock = clock
        self._heats: OrderedDict[BlockHash, _Heat] = OrderedDict()

    def __len__(self) -> int:
        """Prefixes counted."""
        return len(self._heats)

    def asked(self, hashes: Sequence[BlockHash]) -> None:
        """A request with these blocks has come."""
        now = self._clock()
        for depth in depths(len(hashes)):
            name = hashes[depth - 1]
            heat = self._heats.get(name)
            if heat is None:
                self._heats[name] = _Heat(1.0, now)
            else:
                heat.count, heat.at = 1.0 + self._left(heat, now), now
                self._heats.move_to_end(name)
        while self._heats and (len(self._heats) > self._max_prefixes or self._oldest().at < now - FORGET_S):
            self._heats.popitem(last=False)

    def counts(self, hashes: Sequence[BlockHash]) -> dict[int, float]:
        """Requests lately, by how many of these blocks they began with; each counts less as time goes by."""
        now = self._clock()
        known = ((depth, self._heats.get(hashes[depth - 1])) for depth in depths(len(hashes)))
        return {depth: self._left(heat, now) for depth, heat in known if heat is not None}

    def _oldest(self) -> _Heat:
        return next(iter(self._heats.values()))

    def _left(self, heat: _Heat, now: float) -> float:
        return heat.count * math.exp(-(now - heat.at) / TAU_S)

    def check_integrity(self) -> None:
        """Raises AssertionError when the bound or a count is broken; for tests."""
        assert len(self._heats) <= self._max_prefixes
        assert all(heat.count >= 1.0 for heat in self._heats.values())


def depths(blocks: int) -> Iterator[int]:
    """Lengths, in blocks, of the prefixes of a prompt that are counted: few, however long it is."""
    depth = 0
    while depth < blocks:
        depth += 1 << (depth // EXACT).bit_length()
        if depth <= blocks:
            yield depth
