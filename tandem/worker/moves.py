"""What this worker received, by pair and transport, and how fast; and how fast what it writes lands."""

from __future__ import annotations

from tandem.cluster import EARLIER, Incarnation, MoveStat

FORGET = 0.95
"""Weight of the past in the measured rate, per write."""
MAX_PAIRS = 256
"""Senders told apart, each once by transport: one that was restarted is another one."""


class MoveLedger:
    """Counts landed KV: of the latest senders each, and of all older ones together, so that no total goes back."""

    def __init__(self, receiver: str) -> None:
        self._receiver = receiver
        self._stats: dict[tuple[str, str], MoveStat] = {}
        """The one used last is last."""
        self._earlier: dict[str, MoveStat] = {}
        """By transport."""

    def add(self, sender: str, transport: str, size: int, seconds: float) -> None:
        """One hand-over of `size` bytes took `seconds` from its first grant to its end."""
        if size <= 0:
            return
        self._count(MoveStat(sender, self._receiver, transport, size, seconds, tickets=1))

    def failed(self, sender: str, transport: str) -> None:
        """A hand-over from `sender` was not brought to its end."""
        self._count(MoveStat(sender, self._receiver, transport, failures=1))

    def _count(self, more: MoveStat) -> None:
        key = (more.sender, more.transport)
        old = self._stats.pop(key, None)
        self._stats[key] = more if old is None else old.plus(more)
        if len(self._stats) > MAX_PAIRS:
            oldest = self._stats.pop(next(iter(self._stats)))
            over = oldest.transport
            folded = self._earlier.get(over, MoveStat(EARLIER, self._receiver, over))
            self._earlier[over] = folded.plus(oldest)

    def stats(self) -> tuple[MoveStat, ...]:
        """The latest pairs, and what earlier ones come to, by transport."""
        return (*self._earlier.values(), *self._stats.values())


class WriteRate:
    """How fast this worker's writes land. Nothing else is in it: not the wait for what is still computed."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._ms = 0.0

    def add(self, peer: Incarnation, transport: str, size: int, seconds: float) -> None:
        """One write of `size` bytes was complete at the receiver after `seconds`."""
        self._bytes = self._bytes * FORGET + size
        self._ms = self._ms * FORGET + seconds * 1e3

    def bytes_per_ms(self) -> float:
        """Of recent writes; 0 until there was one."""
        return self._bytes / self._ms if self._ms else 0.0
