"""Places to compute that simulated workers share, as those of one machine share its cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Slots:
    """At most so many steps at once; who waits is served in order."""

    def __init__(self, count: int) -> None:
        self.free = count
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, then: Callable[[], None]) -> None:
        """Calls as soon as there is a slot, at once if there is one."""
        if self.free:
            self.free -= 1
            then()
        else:
            self._waiting.append(then)

    def give(self) -> None:
        """Gives a slot back: to the one that has waited longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self.free += 1
