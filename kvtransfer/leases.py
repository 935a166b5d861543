"""Leases: a peer that is silent for too long is given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """Held until `until`, on the table's clock; any message renews it for `seconds`."""

    seconds: float
    until: float


class LeaseTable:
    """Leases by name. The clock is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, name: str, seconds: float) -> None:
        """Starts a lease, or replaces it. Raises ValueError unless `seconds` is positive and finite."""
        if not 0 < seconds < float("inf"):
            raise ValueError(f"lease_s is {seconds}; it must be positive and finite")
        self._leases[name] = Lease(seconds, self._clock() + seconds)

    def renew(self, name: str) -> bool:
        """Extends a lease by its own length; False if it is unknown or has run out: a lease never comes back to life."""
        lease = self._leases.get(name)
        now = self._clock()
        if lease is None or lease.until <= now:
            return False
        self._leases[name] = Lease(lease.seconds, now + lease.seconds)
        return True

    def drop(self, name: str) -> None:
        """Ends a lease, if there is one."""
        self._leases.pop(name, None)

    def expired(self) -> list[str]:
        """Names of leases that ran out and were not dropped yet."""
        now = self._clock()
        return [name for name, lease in self._leases.items() if lease.until <= now]
