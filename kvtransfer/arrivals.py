"""The transfer thread's end of a landing: matches manifests to grants, copies, and checks the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvtransfer.base import Buffer, Landing, TransportError
from kvtransfer.manifest import Manifest, digest, parse


class Fault(Enum):
    """What is wrong with an arrival."""

    DIGEST = "digest"
    """The bytes are not those that were sent."""
    FOREIGN = "foreign"
    """No grant, or another one than the manifest says."""
    DUPLICATE = "duplicate"
    """The grant was used before."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A grant in force: what must be written where."""

    ticket_id: str
    attempt: int
    sequence: int
    start: int
    count: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One manifest of a known ticket: verified data, or what is wrong with it."""

    ticket_id: str
    sequence: int
    data: Buffer | None
    fault: Fault | None = None


class Arrivals:
    """Watched by the transfer thread while grants are out.

    `deliver(arrival)` and `broken(reason)` are called on the transfer thread. A manifest of a ticket that is not known
    (any more) is counted in `late` and dropped: notifications may overtake one another and the ticket's end.
    """

    def __init__(self, landing: Landing, deliver: Callable[[Arrival], None], broken: Callable[[str], None]) -> None:
        self._landing = landing
        self._deliver = deliver
        self._broken = broken
        self._lock = threading.Lock()
        self._open: dict[str, dict[int, Expected | None]] = {}
        self._out = 0
        self.late = 0

    @property
    def busy(self) -> bool:
        """Whether a grant is out."""
        return self._out > 0

    def expect(self, grant: Expected) -> None:
        """Puts a grant in force; call it before the peer can know of the grant. Raises ValueError for a second one."""
        with self._lock:
            grants = self._open.setdefault(grant.ticket_id, {})
            if grant.sequence in grants:
                raise ValueError(f"grant {grant.sequence} of ticket {grant.ticket_id} was given before")
            grants[grant.sequence] = grant
            self._out += 1
        self._landing.allow(grant.offset, grant.length)

    def forget(self, ticket_id: str) -> None:
        """Ends a ticket's grants; call it only when the peer can not write for the ticket any more."""
        with self._lock:
            grants = self._open.pop(ticket_id, {})
            self._out -= sum(grant is not None for grant in grants.values())

    def outstanding(self) -> int:
        """Grants in force."""
        return self._out

    def poll(self) -> bool:
        """Takes what has landed; whether there was anything."""
        try:
            manifests = self._landing.poll()
        except TransportError as error:
            self._broken(str(error))
            return False
        for raw in manifests:
            try:
                manifest = parse(raw)
            except ValueError as error:
                self._broken(str(error))
                return False
            self._take(manifest)
        return bool(manifests)

    def _take(self, manifest: Manifest) -> None:
        with self._lock:
            grants = self._open.get(manifest.ticket_id)
            if grants is None:
                self.late += 1
                return
            known = manifest.sequence in grants
            grant = grants.get(manifest.sequence)
            if grant is not None:
                grants[manifest.sequence] = None
                self._out -= 1
        if grant is None:
            fault, data = (Fault.DUPLICATE if known else Fault.FOREIGN), None
        else:
            fault, data = self._verify(manifest, grant)
        self._deliver(Arrival(manifest.ticket_id, manifest.sequence, data, fault))

    def _verify(self, manifest: Manifest, grant: Expected) -> tuple[Fault | None, Buffer | None]:
        """The copy is checked, not the slab: the peer can still write the slab, but never the copy."""
        said = (manifest.attempt, manifest.start, manifest.count, manifest.length)
        if said != (grant.attempt, grant.start, grant.count, grant.length):
            return Fault.FOREIGN, None
        copy = np.empty(grant.length, dtype=np.uint8)
        copy[:] = self._landing.memory[grant.offset : grant.offset + grant.length]
        if digest(copy) != manifest.digest:
            return Fault.DIGEST, None
        return None, copy
