"""Virtual time: a queue of what happens next. The same calls in the same order give the same run."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds since the start of a simulation, and what is due when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def __call__(self) -> float:
        """The time, for code that takes a clock."""
        return self.now

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls at a time, not before now; calls of one time in the order in which they were asked for."""
        heapq.heappush(self._due, (max(time, self.now), self._count, call, arguments))
        self._count += 1

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls later."""
        self.at(self.now + seconds, call, *arguments)

    def run(self) -> None:
        """Until nothing is due."""
        while self._due:
            self.now, _, call, arguments = heapq.heappop(self._due)
            call(*arguments)
