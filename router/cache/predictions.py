"""What the router itself expects workers to hold soon: only until their answer, or a few seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tandem.cluster import Incarnation
from tandem.kv import BlockHash

PREDICTION_S = 5.0
"""A prediction is dropped after so many seconds even if the worker never answered."""


@dataclass(frozen=True, slots=True)
class _Prediction:
    incarnation: Incarnation
    hashes: tuple[BlockHash, ...]
    expires: float


class Predictions:
    """Prefixes, each from the root, that workers were just asked to compute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[int, _Prediction] = {}
        self._blocks: dict[Incarnation, Counter[BlockHash]] = {}
        self._next = 0

    def __len__(self) -> int:
        """Predictions neither resolved nor expired."""
        return len(self._open)

    def add(self, incarnation: Incarnation, hashes: Sequence[BlockHash]) -> int:
        """Returns the number that `resolve` takes."""
        self._expire()
        number = self._next
        self._next += 1
        self._open[number] = _Prediction(incarnation, tuple(hashes), self._clock() + PREDICTION_S)
        self._blocks.setdefault(incarnation, Counter()).update(hashes)
        return number

    def resolve(self, number: int) -> None:
        """Drops one; unknown numbers (expired, dropped) are ignored."""
        prediction = self._open.pop(number, None)
        if prediction is None:
            return
        blocks = self._blocks[prediction.incarnation]
        blocks.subtract(prediction.hashes)
        for block in prediction.hashes:
            if blocks[block] <= 0:
                del blocks[block]
        if not blocks:
            del self._blocks[prediction.incarnation]

    def drop(self, incarnation: Incarnation) -> None:
        """Drops all of a worker's."""
        for number in [n for n, prediction in self._open.items() if prediction.incarnation == incarnation]:
            self.resolve(number)

    def match(self, hashes: Sequence[BlockHash]) -> Iterator[tuple[Incarnation, int]]:
        """Every worker with any prediction, and how many blocks at the front of `hashes` it should soon hold."""
        self._expire()
        for incarnation, blocks in self._blocks.items():
            yield incarnation, _known_prefix(blocks, hashes)

    def _expire(self) -> None:
        now = self._clock()
        # All live equally long, so the oldest come first.
        for number in list(takewhile(lambda n: self._open[n].expires <= now, self._open)):
            self.resolve(number)

    def check_integrity(self) -> None:
        """Raises AssertionError if the counts are wrong; for tests."""
        counts: dict[Incarnation, Counter[BlockHash]] = {}
        for prediction in self._open.values():
            if prediction.hashes:
                counts.setdefault(prediction.incarnation, Counter()).update(prediction.hashes)
        assert counts == self._blocks


def _known_prefix(known: Mapping[BlockHash, int], hashes: Sequence[BlockHash]) -> int:
    """Length of the front of `hashes` in `known`, which holds whole prefixes: no block without its parent."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in known:
            low = middle + 1
        else:
            high = middle
    return low
