"""All workers this router knows: their subscriptions, their state, and the load sent to them since they reported."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import grpc.aio

from router.cache.prefix_index import PrefixIndex
from router.workers.fleet_link import Link, Worker
from router.workers.load import Booking
from router.workers.snapshot import FleetSnapshot, Load, WorkerView
from tandem.cluster import Incarnation, MoveStat, Role, WorkerInfo, WorkerUpdate
from tandem.errors import Fenced
from tandem.kv import BlockHash

log = logging.getLogger(__name__)


class FleetListener(Protocol):
    """Who wants to know of workers: the dispatcher."""

    def worker_up(self, worker: Worker) -> None:
        """A worker can be used for the first time."""

    def worker_gone(self, incarnation: Incarnation, reason: str) -> None:
        """An incarnation will not be back."""


class Fleet:
    """Follows listed and registered workers. All methods run on the event loop.

    addresses: host:port of workers that are followed for ever. lease_s: silence after which a worker is gone.
    clock: seconds, monotonic.
    """

    def __init__(
        self,
        router_id: str,
        index: PrefixIndex,
        addresses: Iterable[str],
        lease_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.router_id = router_id
        self.lease_s = lease_s
        self.listener: FleetListener | None = None
        self.reference: WorkerInfo | None = None
        """The first worker ever known. All must share its model and layout: the router's tokeniser is that model's."""
        self._index = index
        self._addresses = tuple(addresses)
        self._clock = clock
        self._workers: dict[Incarnation, Worker] = {}
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._past_moves: dict[tuple[str, str, str], MoveStat] = {}

    async def start(self) -> None:
        """Starts following the listed addresses."""
        for address in self._addresses:
            self._connect(address, listed=True)

    async def close(self) -> None:
        """Ends all links; every worker is gone afterwards."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def worker(self, incarnation: Incarnation) -> Worker | None:
        """The worker, unless it is gone."""
        return self._workers.get(incarnation)

    def snapshot(self) -> FleetSnapshot:
        """All usable workers as they are now."""
        return FleetSnapshot(prefill=self._views(Role.PREFILL), decode=self._views(Role.DECODE))

    def _views(self, role: Role) -> tuple[WorkerView, ...]:
        return tuple(
            WorkerView(worker.info, worker.status, worker.ledger.pending, worker.leaving or worker.status.draining)
            for worker in self._workers.values()
            if worker.info.role is role and worker.usable
        )

    def following(self) -> set[str]:
        """Addresses that are connected, or tried again."""
        return set(self._links)

    def prefill_workers(self) -> list[tuple[Incarnation, str]]:
        """Incarnation and address of every usable prefill worker, for decode workers to connect to."""
        return [(view.incarnation, view.info.address) for view in self._views(Role.PREFILL)]

    def moves(self) -> list[MoveStat]:
        """KV moved, by pair and transport, over all decode workers ever seen: counters outlive workers."""
        latest = dict(self._past_moves)
        for worker in self._workers.values():
            latest.update(_by_pair(worker))
        return list(latest.values())

    # Load -----------------------------------------------------------------------------------------------------------

    def book(self, incarnation: Incarnation, load: Load, hashes: Sequence[BlockHash]) -> Booking | None:
        """Counts a request's load on a worker and predicts its blocks there; None if the worker is gone.

        Ends by itself when the worker reports the request; `release` ends it earlier.
        """
        worker = self._workers.get(incarnation)
        if worker is None:
            return None
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

    def _booking_closed(self, booking: Booking) -> None:
        if booking.prediction is not None:
            self._index.predictions.resolve(booking.prediction)

    def bookings(self) -> int:
        """Open bookings over all workers."""
        return sum(len(worker.ledger) for worker in self._workers.values())

    # Registration ---------------------------------------------------------------------------------------------------

    def register(self, info: WorkerInfo, leaving: bool) -> None:
        """A worker announces itself, renews its lease or says goodbye. Raises Fenced if it does not fit."""
        self._check(info)
        link = self._links.get(info.address)
        worker = self._workers.get(info.incarnation)
        if leaving:
            if worker is not None:
                worker.leaving = True
            if link is not None:
                link.give_up()
        elif link is not None:
            link.renew()
        elif worker is None:
            self._connect(info.address, listed=False)

    def _connect(self, address: str, listed: bool) -> None:
        link = Link(address, listed, self, self.router_id, self.lease_s, self._clock)
        self._links[address] = link
        task = asyncio.create_task(link.run(), name=f"link-{address}")
        self._tasks[address] = task
        task.add_done_callback(lambda ended: self._link_ended(address, ended))

    def _link_ended(self, address: str, task: asyncio.Task[None]) -> None:
        del self._tasks[address]
        del self._links[address]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the link to worker %s failed", address, exc_info=error)

    def _check(self, info: WorkerInfo) -> None:
        known = self.reference
        if known is None:
            return
        who = f"{info.role.value} worker {info.address}"
        if info.model.fingerprint != known.model.fingerprint:
            raise Fenced(
                f"{who} serves model {info.model.name} with fingerprint {info.model.fingerprint}; "
                f"this cluster serves {known.model.name} with fingerprint {known.model.fingerprint}",
                param="model",
            )
        if (info.layout, info.kv_dtype) != (known.layout, known.kv_dtype):
            raise Fenced(
                f"{who} has KV layout {info.layout.digest()} of {info.kv_dtype}; "
                f"this cluster has {known.layout.digest()} of {known.kv_dtype}",
                param="layout",
            )

    # What links tell ------------------------------------------------------------------------------------------------

    def join(self, info: WorkerInfo, channel: grpc.aio.Channel) -> Worker:
        """Takes a worker in that answered. Raises Fenced if it does not fit or is known by another address."""
        self._check(info)
        if info.incarnation in self._workers:
            raise Fenced(f"{info.incarnation} is already connected under another address")
        worker = Worker(info, channel, self._booking_closed, self._clock())
        self._workers[info.incarnation] = worker
        self.reference = self.reference or info
        return worker

    def update(self, worker: Worker, update: WorkerUpdate) -> None:
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
        if not worker.announced:
            worker.announced = True
            log.info("%s worker %s at %s is up", worker.info.role.value, worker.incarnation, worker.info.address)
            if self.listener is not None:
                self.listener.worker_up(worker)

    def suspend(self, worker: Worker, reason: str) -> None:
        """Nothing new goes there, and nothing is believed of its cache, until it is found again."""
        log.warning("%s worker %s at %s: %s", worker.info.role.value, worker.incarnation, worker.info.address, reason)
        worker.usable = False
        self._index.drop(worker.incarnation)

    def gone(self, worker: Worker, reason: str) -> None:
        """Forgets an incarnation and tells the listener."""
        worker.usable = False
        self._index.drop(worker.incarnation)
        worker.ledger.close()
        self._past_moves.update(_by_pair(worker))
        del self._workers[worker.incarnation]
        if self.listener is not None:
            self.listener.worker_gone(worker.incarnation, reason)


def _by_pair(worker: Worker) -> dict[tuple[str, str, str], MoveStat]:
    return {(move.sender, move.receiver, move.transport): move for move in worker.status.moves}
