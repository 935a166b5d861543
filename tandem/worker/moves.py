"""What this worker received, by pair and transport, and how fast."""

from __future__ import annotations

from dataclasses import replace

from tandem.cluster import MoveStat


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
