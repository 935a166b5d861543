"""What the router itself expects workers to hold soon: only until their answer, or a few seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
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
        self._holders: dict[BlockHash, dict[Incarnation, int]] = {}
        """Per block, the workers with predictions of it, and how many."""
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
        for block in hashes:
            holders = self._holders.setdefault(block, {})
            holders[incarnation] = holders.get(incarnation, 0) + 1
        return number

    def resolve(self, number: int) -> None:
        """Drops one; unknown numbers (expired, dropped) are ignored."""
        prediction = self._open.pop(number, None)
        if prediction is None:
            return
        for block in prediction.hashes:
            holders = self._holders[block]
            holders[prediction.incarnation] -= 1
            if not holders[prediction.incarnation]:
                del holders[prediction.incarnation]
                if not holders:
                    del self._holders[block]

    def drop(self, incarnation: Incarnation) -> None:
        """Drops all of a worker's."""
        for number in [n for n, prediction in self._open.items() if prediction.incarnation == incarnation]:
            self.resolve(number)

    def match(self, hashes: Sequence[BlockHash]) -> dict[Incarnation, int]:
        """How many blocks at the front of `hashes` each worker should soon hold, if any.

        Predictions are whole prefixes, so fewer workers have the longer ones: only where they get fewer is looked.
        """
        self._expire()
        found: dict[Incarnation, int] = {}
        start = 0
        while start < len(hashes) and (holders := self._holders.get(hashes[start])):
            same = len(holders)
            start = bisect_left(range(len(hashes)), True, start + 1, key=lambda at: self._count(hashes[at]) < same)
            found.update(dict.fromkeys(holders, start))
        return found

    def _count(self, block: BlockHash) -> int:
        return len(self._holders.get(block, ()))

    def _expire(self) -> None:
        now = self._clock()
        # All live equally long, so the oldest come first.
        for number in list(takewhile(lambda n: self._open[n].expires <= now, self._open)):
            self.resolve(number)

    def check_integrity(self) -> None:
        """Raises AssertionError if the counts are wrong; for tests."""
        counts: dict[BlockHash, Counter[Incarnation]] = {}
        for prediction in self._open.values():
            for block in prediction.hashes:
                counts.setdefault(block, Counter())[prediction.incarnation] += 1
        assert counts == self._holders
