"""The transfer thread's end of a landing: matches manifests to grants, copies, and checks the copy."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvtransfer.base import Buffer, Landing
from kvtransfer.layout import SLAB_SPANS
from kvtransfer.manifest import Manifest, digest, parse

log = logging.getLogger(__name__)


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
    outcome: Buffer | Fault


class Arrivals:
    """Polled by the transfer thread while grants are out, i.e. `outstanding` is not 0.

    `deliver(arrival)` and `broken(reason)` are called on that thread. A manifest of a ticket that is not known (any
    more) is counted in `late` and dropped: notifications may be overtaken by their ticket's end.
    """

    def __init__(self, landing: Landing, deliver: Callable[[Arrival], object], broken: Callable[[str], object]) -> None:
        self._landing, self._deliver, self._broken = landing, deliver, broken
        self._lock = threading.Lock()
        self._grants: dict[str, dict[int, Expected | None]] = {}
        self._spare: deque[Buffer] = deque(maxlen=SLAB_SPANS)
        self.outstanding = self.late = 0
        landing.guard(self.allows)

    def expect(self, grant: Expected) -> None:
        """Puts a grant in force; call it before the peer can know of it. Raises ValueError for a second one."""
        with self._lock:
            grants = self._grants.setdefault(grant.ticket_id, {})
            if grant.sequence in grants:
                raise ValueError(f"grant {grant.sequence} of ticket {grant.ticket_id} was given before")
            grants[grant.sequence] = grant
            self.outstanding += 1

    def forget(self, ticket_id: str) -> None:
        """Ends a ticket's grants; call it only when the peer cannot write for the ticket any more."""
        with self._lock:
            grants = self._grants.pop(ticket_id, {})
            self.outstanding -= sum(grant is not None for grant in grants.values())

    def allows(self, offset: int, length: int) -> bool:
        """Whether a grant for exactly this range is in force."""
        with self._lock:
            grants = [grant for ticket in self._grants.values() for grant in ticket.values() if grant is not None]
        return any((grant.offset, grant.length) == (offset, length) for grant in grants)

    def recycle(self, data: Buffer) -> None:
        """Gives verified data back when nobody reads it any more: first writes into fresh memory are slow."""
        self._spare.append(data if data.base is None else data.base)

    def _buffer(self, length: int) -> Buffer:
        try:
            spare = self._spare.pop()
        except IndexError:
            spare = np.empty(0, dtype=np.uint8)
        return spare[:length] if spare.nbytes >= length else np.empty(length, dtype=np.uint8)

    def poll(self) -> bool:
        """Takes what has landed; whether there was anything. A landing or a manifest that is bad breaks the pair."""
        try:
            manifests = [parse(raw) for raw in self._landing.poll()]
            for manifest in manifests:
                self._take(manifest)
        except Exception as error:
            log.debug("a landing is given up", exc_info=True)
            self._broken(str(error))
            return False
        return bool(manifests)

    def _take(self, manifest: Manifest) -> None:
        with self._lock:
            grants = self._grants.get(manifest.ticket_id)
            if grants is None:
                self.late += 1
                return
            used = manifest.sequence in grants
            if (grant := grants.get(manifest.sequence)) is not None:
                grants[manifest.sequence] = None
                self.outstanding -= 1
        if grant is not None:
            outcome = self._verify(manifest, grant)
        else:
            outcome = Fault.DUPLICATE if used else Fault.FOREIGN
        self._deliver(Arrival(manifest.ticket_id, manifest.sequence, outcome))

    def _verify(self, manifest: Manifest, grant: Expected) -> Buffer | Fault:
        """The copy is checked, not the slab: the peer can still write the slab, but never the copy."""
        said = (manifest.attempt, manifest.start, manifest.count, manifest.length)
        if said != (grant.attempt, grant.start, grant.count, grant.length):
            return Fault.FOREIGN
        copy = self._buffer(grant.length)
        copy[:] = self._landing.memory[grant.offset : grant.offset + grant.length]
        return copy if digest(copy) == manifest.digest else Fault.DIGEST
