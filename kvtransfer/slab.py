"""Memory that spans land in and are sent from: byte ranges, the staging, and the cap over all slabs."""

from __future__ import annotations

import asyncio
import mmap
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvtransfer.base import MIB, Buffer
from tandem.errors import Overloaded

ALIGN = 64
"""Ranges start at multiples of a cache line."""


def allocate_memory(size: int) -> Buffer:
    """Zeroed anonymous memory whose pages have been touched: first writes into untouched ones are many times slower."""
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    memory[:] = 0
    return memory


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes `[offset, offset + size)`; `size` is rounded up to `ALIGN`."""

    offset: int
    size: int


class Ranges:
    """First-fit allocator of byte ranges that joins neighbours when they are released."""

    def __init__(self, size: int) -> None:
        self.size = size // ALIGN * ALIGN
        self._free = [Range(0, self.size)]
        self._used: dict[int, Range] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes in ranges that were not released."""
        return sum(used.size for used in self._used.values())

    def allocate(self, length: int) -> Range | None:
        """A range of at least `length` bytes, or None while there is no room. Raises ValueError if there never is."""
        size = -(-length // ALIGN) * ALIGN
        if not 0 < size <= self.size:
            raise ValueError(f"a range of {length} bytes does not fit into {self.size}")
        for index, hole in enumerate(self._free):
            if hole.size >= size:
                rest = [Range(hole.offset + size, hole.size - size)] if hole.size > size else []
                self._free[index : index + 1] = rest
                taken = self._used[hole.offset] = Range(hole.offset, size)
                return taken
        return None

    def release(self, taken: Range) -> None:
        """Gives a range back. Raises ValueError if it is not in use."""
        if self._used.get(taken.offset) != taken:
            raise ValueError(f"range {taken} is not in use")
        del self._used[taken.offset]
        first = last = bisect_left(self._free, taken)
        low, high = taken.offset, taken.offset + taken.size
        if last < len(self._free) and self._free[last].offset == high:
            high += self._free[last].size
            last += 1
        if first and self._free[first - 1].offset + self._free[first - 1].size == low:
            first -= 1
            low = self._free[first].offset
        self._free[first:last] = [Range(low, high - low)]

    def check_integrity(self) -> None:
        """Raises AssertionError unless free and used ranges tile the memory and no two free ones touch."""
        position, after_free = 0, False
        for part in sorted([*self._free, *self._used.values()]):
            is_free = part.offset not in self._used
            assert part.offset == position, f"gap or overlap at {position}: {part}"
            assert not (after_free and is_free), f"free neighbours at {position}"
            position, after_free = position + part.size, is_free
        assert position == self.size, f"ranges end at {position} of {self.size}"


@dataclass(eq=False, slots=True)
class _Waiting:
    length: int
    owner: object
    wanted: Callable[[], bool]
    future: asyncio.Future[Range | None]


class Staging:
    """Memory that spans are gathered into and sent from.

    Those who wait for room are served in order, but for owners that hold half of it: a peer that stands still keeps
    what it holds, and the others go on with the rest.
    """

    def __init__(self, size: int) -> None:
        self.memory = allocate_memory(size)
        self._ranges = Ranges(size)
        self.size = self._ranges.size
        """Bytes of the largest range there can be."""
        self._waiting: list[_Waiting] = []
        self._owners: dict[Range, object] = {}
        self.check_integrity = self._ranges.check_integrity

    @property
    def used_bytes(self) -> int:
        """Bytes in use."""
        return self._ranges.used_bytes

    async def obtain(self, length: int, owner: object, wanted: Callable[[], bool]) -> Range | None:
        """Waits for a range; None once `serve` finds it not wanted any more. Raises ValueError when it never fits."""
        if length > self.size:
            raise ValueError(f"a span of {length} bytes does not fit into {self.size} bytes of staging")
        waiting = _Waiting(length, owner, wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self.serve()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            if not waiting.future.cancelled() and (taken := waiting.future.result()) is not None:
                self.release(taken)  # it was served in the same moment
            raise

    def view(self, taken: Range, length: int) -> Buffer:
        """The first `length` bytes of a range."""
        return self.memory[taken.offset : taken.offset + length]

    def release(self, taken: Range) -> None:
        """Gives a range back and serves those who wait."""
        self._ranges.release(taken)
        del self._owners[taken]
        self.serve()

    def serve(self) -> None:
        """Gives those who wait what there is for them; also to be called when something may not be wanted any more."""
        room = True
        for waiting in self._waiting[:]:
            taken = None
            if not waiting.future.done() and waiting.wanted():
                if not room or self._at_half(waiting.owner, waiting.length):
                    continue
                if (taken := self._ranges.allocate(waiting.length)) is None:
                    room = False
                    continue
                self._owners[taken] = waiting.owner
            self._waiting.remove(waiting)
            if not waiting.future.done():
                waiting.future.set_result(taken)

    def _at_half(self, owner: object, length: int) -> bool:
        held = sum(taken.size for taken, holder in self._owners.items() if holder is owner)
        return held > 0 and held + length > self.size // 2


class SlabBudget:
    """The cap over all landing slabs of a worker.

    A slab whose peer was given up stays charged, as quarantined, until its landing is closed: only then can nobody
    write it any more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._charged: dict[int, int] = {}
        self._quarantined: set[int] = set()
        self._next = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all slabs, quarantined ones included."""
        return sum(self._charged.values())

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of slabs of peers that were given up and whose landing is not closed yet."""
        return sum(self._charged[key] for key in self._quarantined)

    @property
    def stuck(self) -> bool:
        """Whether quarantine alone keeps a slab of the usual size from being made: the worker should drain and exit."""
        return self.quarantined_bytes + max(self._charged.values(), default=0) > self.max_bytes

    def take(self, size: int) -> int:
        """Charges a slab and returns its key. Raises Overloaded over the cap."""
        if self.used_bytes + size > self.max_bytes:
            raise Overloaded(
                f"landing slabs use {self.used_bytes} bytes ({self.quarantined_bytes} quarantined); "
                f"{size} more exceed slabs_max_mib = {self.max_bytes / MIB:g}"
            )
        self._next += 1
        self._charged[self._next] = size
        return self._next

    def quarantine(self, key: int) -> None:
        """The slab's peer was given up."""
        assert key in self._charged, f"slab {key} is unknown"
        self._quarantined.add(key)

    def release(self, key: int) -> None:
        """The slab's landing is closed."""
        del self._charged[key]
        self._quarantined.discard(key)

    def check_integrity(self) -> None:
        """Raises AssertionError when a quarantined slab is not charged or the cap is exceeded."""
        assert self._quarantined <= self._charged.keys()
        assert self.used_bytes <= self.max_bytes
