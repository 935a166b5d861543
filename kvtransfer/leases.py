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
    """Leases by name. The clock is monotonic seconds. A lease that ran out never comes back to life."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, Lease] = {}

    def grant(self, name: str, seconds: float) -> None:
        """Starts a lease, or replaces it. Raises ValueError unless `seconds` is positive and finite."""
        if not 0 < seconds < float("inf"):
            raise ValueError(f"lease_s is {seconds}; it must be positive and finite")
        self._leases[name] = Lease(seconds, self._clock() + seconds)

    def ran_out(self, name: str) -> bool:
        """Whether nobody holds this lease any more; also true of one that was never granted."""
        lease = self._leases.get(name)
        return lease is None or lease.until <= self._clock()

    def renew(self, name: str) -> bool:
        """Extends a lease by its own length from now; False if it ran out."""
        if self.ran_out(name):
            return False
        self.grant(name, self._leases[name].seconds)
        return True

    def drop(self, name: str) -> None:
        """Ends a lease, if there is one."""
        self._leases.pop(name, None)
