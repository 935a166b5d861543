"""The workers of a cluster as a router knows them: what they report, and the load sent to them since. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from router.cache.prefix_index import PrefixIndex
from router.workers.load import Booking, LoadLedger
from router.workers.snapshot import FleetSnapshot, Load, WorkerView, decayed
from tandem.cluster import Incarnation, Role, Status, WorkerInfo, WorkerUpdate
from tandem.kv import BlockHash


class Member:
    """One incarnation of a worker: what it is, what it said last, and what was sent to it since."""

    def __init__(self, info: WorkerInfo, on_close: Callable[[Booking], None], now: float) -> None:
        self.info = info
        self.status = Status(info.incarnation, free_pages=info.total_pages, total_pages=info.total_pages)
        self.ledger = LoadLedger(info.incarnation, on_close)
        self.usable = False
        """Whether its subscription stands: only then new requests go there."""
        self.leaving = False
        self.heard = now
        """When its last update came."""
        self.since = now
        """When it was first known."""
        self._recent = 0.0
        self._recent_at = now
        self._view: WorkerView | None = None
        self._changes = -1

    @property
    def incarnation(self) -> Incarnation:
        """Which one."""
        return self.info.incarnation

    def view(self) -> WorkerView:
        """What policies see of it; made anew only when something changed."""
        view = self._view
        draining = self.leaving or self.status.draining
        if (
            view is None
            or view.status is not self.status
            or view.draining is not draining
            or self._changes != self.ledger.changes
        ):
            recent = (self._recent, self._recent_at)
            view = self._view = WorkerView(self.info, self.status, self.ledger.pending, draining, *recent, self.since)
            self._changes = self.ledger.changes
        return view

    def recent(self, now: float) -> float:
        """Prompt tokens sent to be computed there, each counting less as time goes by."""
        return decayed(self._recent, now - self._recent_at)

    def worked(self, tokens: float, now: float) -> None:
        """Notes prompt tokens sent to be computed there."""
        self._recent = self.recent(now) + tokens
        self._recent_at = now


M = TypeVar("M", bound=Member)


class Members(Generic[M]):
    """All workers known, by incarnation: their load and, in the index, their caches.

    router_id: whose dispatches count in what workers report. clock: seconds, monotonic.
    """

    def __init__(self, router_id: str, index: PrefixIndex, clock: Callable[[], float]) -> None:
        self.router_id = router_id
        self._index = index
        self._clock = clock
        self._workers: dict[Incarnation, M] = {}
        self._roles: dict[Role, dict[Incarnation, M]] = {role: {} for role in Role}

    def worker(self, incarnation: Incarnation) -> M | None:
        """The worker, unless it is gone."""
        return self._workers.get(incarnation)

    def known(self) -> Collection[M]:
        """All workers, those that cannot be used now, too."""
        return self._workers.values()

    def snapshot(self) -> FleetSnapshot:
        """All usable workers as they are now."""
        return FleetSnapshot(prefill=self._views(Role.PREFILL), decode=self._views(Role.DECODE))

    def _views(self, role: Role) -> tuple[WorkerView, ...]:
        return tuple([worker.view() for worker in self._roles[role].values() if worker.usable])

    def add(self, worker: M) -> None:
        """Takes a worker in; it can be used once it has reported.

        It counts as having worked as much as the others lately: else it would be given everything at once.
        """
        now, peers = self._clock(), self._roles[worker.info.role].values()
        if peers:
            worker.worked(sum(peer.recent(now) for peer in peers) / len(peers), now)
        self._workers[worker.incarnation] = self._roles[worker.info.role][worker.incarnation] = worker

    def observe(self, worker: M, update: WorkerUpdate) -> None:
        """Applies events to the index, then the status: it includes what the events before it told."""
        if update.snapshot:
            self._index.snapshot(worker.incarnation, update.events)
        else:
            for event in update.events:
                self._index.apply(worker.incarnation, event)
        worker.ledger.observe(update.events)
        if update.status is not None:
            worker.status = update.status
            worker.ledger.reported(update.status.dispatches.get(self.router_id, 0))
        worker.usable = True

    def lose_sight(self, worker: M) -> None:
        """Nothing new goes there, and nothing is believed of its cache, until it reports again."""
        worker.usable = False
        self._index.drop(worker.incarnation)

    def remove(self, worker: M) -> None:
        """Forgets an incarnation."""
        self.lose_sight(worker)
        worker.ledger.close()
        del self._workers[worker.incarnation], self._roles[worker.info.role][worker.incarnation]

    # Load -----------------------------------------------------------------------------------------------------------

    def book(self, incarnation: Incarnation, load: Load, hashes: Sequence[BlockHash]) -> Booking | None:
        """Counts a request's load on a worker and predicts its blocks there; None if the worker is gone.

        Ends by itself when the worker reports the request; `release` ends it earlier.
        """
        worker = self._workers.get(incarnation)
        if worker is None:
            return None
        worker.worked(load.prefill_tokens, self._clock())
        # A prefill worker hears of it from the decode worker: only its promise tells that it did.
        last_block = hashes[-1] if hashes and worker.info.role is Role.PREFILL else None
        return worker.ledger.book(
            load, last_block, self._index.predictions.add(incarnation, hashes) if hashes else None
        )

    def release(self, booking: Booking | None) -> bool:
        """Ends a booking; whether it had not ended yet."""
        worker = None if booking is None else self._workers.get(booking.incarnation)
        return booking is not None and worker is not None and worker.ledger.release(booking)

    def ended(self, incarnation: Incarnation, load: Load) -> None:
        """A request that the worker's status includes has ended; the next status will know."""
        worker = self._workers.get(incarnation)
        if worker is not None:
            worker.ledger.ended(load)

    def booking_closed(self, booking: Booking) -> None:
        """For the ledgers: what was predicted with a booking ends with it."""
        if booking.prediction is not None:
            self._index.predictions.resolve(booking.prediction)

    def bookings(self) -> int:
        """Open bookings over all workers."""
        return sum(len(worker.ledger) for worker in self._workers.values())
