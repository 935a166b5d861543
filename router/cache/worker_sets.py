"""Sets of workers as bitmasks: which worker has which bit, and each set that occurs, once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress

from tandem.cluster import Incarnation

EMPTY = 0
"""The number of the empty set."""
FEW = 24
"""Members up to which a mask is read bit by bit."""

_BITS = bytes.maketrans(b"01", b"\x00\x01")


class WorkerBits:
    """A bit for each worker. A retired one is taken again only when no set has it any more."""

    def __init__(self) -> None:
        self._bits: dict[Incarnation, int] = {}
        self._names: list[Incarnation] = []
        self._free: list[int] = []
        self.live = 0
        """The bits of all workers that are there."""
        self.retired = 0
        """Bits that sets may still have, of workers that are gone."""

    def of(self, worker: Incarnation) -> int:
        """The bit of a worker, as a mask; a worker not heard of before is added."""
        place = self._bits.get(worker)
        if place is None:
            if self._free:
                place = self._free.pop()
            else:
                place = len(self._names)
                self._names.append("")
            self._bits[worker] = place
            self._names[place] = worker
            self.live |= 1 << place
        return 1 << place

    def retire(self, worker: Incarnation) -> None:
        """Takes a worker's bit away; no mask names it from now on."""
        place = self._bits.pop(worker, None)
        if place is not None:
            self._names[place] = ""
            self.live &= ~(1 << place)
            self.retired |= 1 << place

    def release(self, mask: int) -> None:
        """No set has these retired bits any more."""
        self.retired &= ~mask
        self._free.extend(_places(mask))

    def note(self, found: dict[Incarnation, int], mask: int, value: int) -> None:
        """Sets `value` for each worker in a mask of live bits."""
        names = self._names
        if mask.bit_count() > FEW:
            members = compress(names, bin(mask)[:1:-1].encode().translate(_BITS))
            found.update(dict.fromkeys(members, value))
            return
        while mask:
            place = mask.bit_length() - 1
            found[names[place]] = value
            mask ^= 1 << place

    def check_integrity(self) -> None:
        """Raises AssertionError if the views differ; for tests."""
        assert self.live == sum(1 << place for place in self._bits.values())
        assert {name: place for place, name in enumerate(self._names) if name} == self._bits
        taken = self.live | self.retired
        assert sorted([*_places(taken), *self._free]) == list(range(len(self._names)))


class WorkerSets:
    """Pairs of masks (stored, promised) under small numbers, counted by use: thousands of nodes share a few sets."""

    def __init__(self) -> None:
        self.stored = [0]
        self.promised = [0]
        self.either = [0]
        """Workers that have stored or promised it, by number."""
        self._uses = [1]
        self._numbers = {(0, 0): EMPTY}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, stored: int, promised: int) -> int:
        """The number of a set, used once more."""
        number = self._numbers.get((stored, promised))
        if number is None:
            number = self._make(stored, promised)
        self._uses[number] += 1
        return number

    def use(self, number: int) -> int:
        """The same number, used once more."""
        self._uses[number] += 1
        return number

    def drop(self, number: int) -> None:
        """Used once less; the last use ends it."""
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._numbers[self.stored[number], self.promised[number]]
            self.stored[number] = self.promised[number] = self.either[number] = 0
            self._free.append(number)

    def _make(self, stored: int, promised: int) -> int:
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._uses)
            for column in (self.stored, self.promised, self.either, self._uses):
                column.append(0)
        self.stored[number], self.promised[number], self.either[number] = stored, promised, stored | promised
        self._numbers[stored, promised] = number
        return number

    def check_integrity(self, used: dict[int, int]) -> None:
        """Raises AssertionError unless the uses are those counted; for tests."""
        counted = {number: uses for number, uses in enumerate(self._uses) if uses and number != EMPTY}
        assert counted == {number: uses for number, uses in used.items() if number != EMPTY}
        assert all((self.stored[n], self.promised[n]) == masks for masks, n in self._numbers.items())


def _places(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
