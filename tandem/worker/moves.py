"""What this worker received, by pair and transport, and how fast; and how fast what it writes lands."""

from __future__ import annotations

from dataclasses import replace

from tandem.cluster import Incarnation, MoveStat

FORGET = 0.95
"""Weight of the past in the measured rate, per write."""


class MoveLedger:
    """Counts landed KV."""

    def __init__(self, receiver: str) -> None:
        self._receiver = receiver
        self._stats: dict[tuple[str, str], MoveStat] = {}

    def add(self, sender: str, transport: str, size: int, seconds: float) -> None:
        """One hand-over of `size` bytes took `seconds` from its first grant to its end."""
        if size <= 0:
            return
        key = (sender, transport)
        old = self._stats.get(key, MoveStat(sender, self._receiver, transport))
        self._stats[key] = replace(old, bytes=old.bytes + size, seconds=old.seconds + seconds, tickets=old.tickets + 1)

    def failed(self, sender: str, transport: str) -> None:
        """A hand-over from `sender` was not brought to its end."""
        old = self._stats.get((sender, transport), MoveStat(sender, self._receiver, transport))
        self._stats[sender, transport] = replace(old, failures=old.failures + 1)

    def stats(self) -> tuple[MoveStat, ...]:
        """All pairs so far."""
        return tuple(self._stats.values())


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
