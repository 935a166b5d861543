"""What this worker received, by pair and transport, and how fast."""

from __future__ import annotations

from dataclasses import replace

from tandem.cluster import MoveStat

FORGET = 0.9
"""Weight of the past in the measured rate, per hand-over."""


class MoveLedger:
    """Counts landed KV. The rate is over whole hand-overs, so it includes what moving really costs a request."""

    def __init__(self, receiver: str) -> None:
        self._receiver = receiver
        self._stats: dict[tuple[str, str], MoveStat] = {}
        self._bytes = 0.0
        self._ms = 0.0

    def add(self, sender: str, transport: str, size: int, seconds: float) -> None:
        """One hand-over of `size` bytes took `seconds` from its first grant to its end."""
        if size <= 0:
            return
        key = (sender, transport)
        old = self._stats.get(key, MoveStat(sender, self._receiver, transport))
        self._stats[key] = replace(old, bytes=old.bytes + size, seconds=old.seconds + seconds, tickets=old.tickets + 1)
        self._bytes = self._bytes * FORGET + size
        self._ms = self._ms * FORGET + seconds * 1e3

    def bytes_per_ms(self) -> float:
        """The recent rate; 0 until one was measured."""
        return self._bytes / self._ms if self._ms else 0.0

    def stats(self) -> tuple[MoveStat, ...]:
        """All pairs so far."""
        return tuple(self._stats.values())
