"""What this router sent a worker and the worker's last status does not include yet: load is never counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.workers.snapshot import Load
from tandem.cluster import CacheEvent, EventKind, Incarnation
from tandem.kv import BlockHash


@dataclass(slots=True, eq=False)
class Booking:
    """One request's load on one worker, until the worker reports it itself or the request ends."""

    incarnation: Incarnation
    number: int
    """Increases per worker; travels in Submit and comes back in `Status.dispatches`."""
    load: Load
    last_block: BlockHash | None = None
    """Block whose promise tells that the worker took the request; for workers that the router does not submit to."""
    prediction: int | None = None
    """The index's prediction that ends with this booking."""
    promised: bool = False


class LoadLedger:
    """The open bookings of one worker. on_close receives each booking once, when it ends."""

    def __init__(self, incarnation: Incarnation, on_close: Callable[[Booking], None]) -> None:
        self._incarnation = incarnation
        self._on_close = on_close
        self._open: dict[int, Booking] = {}
        self._last = 0
        self._booked = Load()
        self._ended = Load()
        self.changes = 0
        """Counts what may have changed `pending`."""

    def __len__(self) -> int:
        """Open bookings."""
        return len(self._open)

    def book(self, load: Load, last_block: BlockHash | None, prediction: int | None) -> Booking:
        """Opens a booking."""
        self._last += 1
        booking = Booking(self._incarnation, self._last, load, last_block, prediction)
        self._open[booking.number] = booking
        self._booked += load
        self.changes += 1
        return booking

    @property
    def pending(self) -> Load:
        """What the last status lacks: open bookings, less what has ended since."""
        return self._booked + self._ended

    def ended(self, load: Load) -> None:
        """A request that the last status includes has ended: else a worker looks busy to its own next turn."""
        self._ended += load.negated()
        self.changes += 1

    def observe(self, events: Iterable[CacheEvent]) -> None:
        """Notes promises: the next status includes the requests that they were made for."""
        waiting = {b.last_block: b for b in self._open.values() if b.last_block is not None and not b.promised}
        if not waiting:
            return
        for event in events:
            if event.kind in (EventKind.PROMISED, EventKind.STORED):
                for block in waiting.keys() & set(event.hashes):
                    waiting[block].promised = True

    def reported(self, last_dispatch: int) -> None:
        """A status arrived that includes the dispatches up to `last_dispatch`, and the promises seen before it."""
        self._ended = Load()
        self.changes += 1
        # A worker that was given up and is back goes on counting where it was.
        self._last = max(self._last, last_dispatch)
        for booking in [b for b in self._open.values() if b.number <= last_dispatch or b.promised]:
            self.release(booking)

    def release(self, booking: Booking) -> bool:
        """Ends a booking; False when it had ended before."""
        if self._open.pop(booking.number, None) is None:
            return False
        self._booked += booking.load.negated()
        self.changes += 1
        self._on_close(booking)
        return True

    def close(self) -> None:
        """Ends all bookings: the worker is gone."""
        for booking in list(self._open.values()):
            self.release(booking)

    def check_integrity(self) -> None:
        """Raises AssertionError if the sum is wrong; for tests."""
        assert self._booked == sum((b.load for b in self._open.values()), Load())
