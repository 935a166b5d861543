"""Cores that all processes of a simulated machine share: workers' steps, and what runs beside them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from router.simulation.clock import Clock

ROUNDING_S = 1e-9


class Cores:
    """Tasks on so many cores, an equal part for each (processor sharing), and as many places for steps.

    A worker's step waits for a place in order, as `tandem.compute_slots` has it; everything else begins at once, and
    makes what runs slower. background: cores that are always busy, with reports and heartbeats. crowding, contention:
    see `Machine`.
    """

    def __init__(
        self, clock: Clock, count: int, background: float = 0.0, crowding: float = 0.0, contention: float = 0.0
    ) -> None:
        self.free = count
        """Places for steps."""
        self._clock = clock
        self._count = count
        self._cores = max(count - background, 0.05 * count)
        self._crowding = crowding
        self._contention = contention
        self._waiting: deque[Callable[[], None]] = deque()
        self._tasks: list[tuple[float, int, Callable[[], None]]] = []
        """By the work that every task must have got before it ends."""
        self._order = 0
        self._got = 0.0
        """Seconds of work that each task has got, or would have, had it been here all the time."""
        self._at = 0.0

    def take(self, then: Callable[[], None]) -> None:
        """Calls as soon as there is a place for a step, at once if there is one."""
        if self.free:
            self.free -= 1
            then()
        else:
            self._waiting.append(then)

    def give(self) -> None:
        """Gives a place back: to the one that has waited longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self.free += 1

    def run(self, seconds: float, then: Callable[[], None]) -> None:
        """Calls when so much work has been done, each task getting at most one core."""
        self._advance()
        heapq.heappush(self._tasks, (self._got + seconds, self._order, then))
        self._order += 1
        self._await()

    @property
    def stretch(self) -> float:
        """How many times as long it takes now what has to be woken many times."""
        return 1 + self._contention * min(len(self._tasks), self._count) / self._count

    @property
    def busy(self) -> int:
        """Tasks that run."""
        return len(self._tasks)

    def _rate(self) -> float:
        tasks = len(self._tasks)
        alone = min(1.0, self._cores / tasks)
        others = min(tasks, self._count) - 1
        return alone / (1 + self._crowding * others / max(self._count - 1, 1))

    def _advance(self) -> None:
        if self._tasks:
            self._got += (self._clock.now - self._at) * self._rate()
        self._at = self._clock.now

    def _await(self) -> None:
        if self._tasks:
            left = self._tasks[0][0] - self._got
            self._clock.after(max(left, 0.0) / self._rate(), self._end, self._order)

    def _end(self, order: int) -> None:
        if order != self._order:
            return  # another task has come since, or one has gone
        self._advance()
        ended = []
        while self._tasks and self._tasks[0][0] <= self._got + ROUNDING_S:
            ended.append(heapq.heappop(self._tasks)[2])
        self._order += 1
        self._await()
        for then in ended:
            then()
