"""All workers this router knows: their subscriptions, their state, and the load sent to them since they reported."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import grpc.aio

from router.cache.prefix_index import PrefixIndex
from router.workers.fleet_link import Link, Worker
from router.workers.members import Members
from tandem.cluster import EARLIER, Incarnation, MoveStat, Role, Status, WorkerInfo, WorkerUpdate
from tandem.errors import Fenced
from tandem.trust import Trust

log = logging.getLogger(__name__)

END_CAUSES = ("goodbye", "lost")
MAX_PAST_PAIRS = 512
"""Pairs remembered whose receiver is gone."""


class FleetListener(Protocol):
    """Who wants to know of workers: the dispatcher."""

    def worker_up(self, worker: Worker) -> None:
        """A worker can be used for the first time."""

    def worker_reported(self, status: Status) -> None:
        """A worker's status has arrived."""

    def worker_gone(self, incarnation: Incarnation, reason: str) -> None:
        """An incarnation will not be back."""


class Fleet(Members[Worker]):
    """Follows listed and registered workers. All methods run on the event loop.

    lease_s: silence after which a worker is gone. clock: seconds, monotonic.
    """

    def __init__(
        self,
        router_id: str,
        index: PrefixIndex,
        lease_s: float,
        clock: Callable[[], float],
        trust: Trust = Trust(),
    ) -> None:
        """trust: how workers know this router."""
        super().__init__(router_id, index, clock)
        self.trust = trust
        self.lease_s = lease_s
        self.listener: FleetListener | None = None
        self.reference: WorkerInfo | None = None
        """The first worker known since there was none. All must share its model and layout, until the last is gone."""
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.ends: Counter[tuple[Role, str]] = Counter()
        """Incarnations gone so far, by cause."""
        self.lease_expiries: Counter[Role] = Counter()
        self._past_moves: dict[tuple[str, str, str], MoveStat] = {}
        self._known_as: dict[str, Role] = {}
        self._shunned: set[str] = set()

    def follow(self, address: str, role: Role | None = None) -> None:
        """Looks for a worker at an address until `unfollow`. role: the only one that is used there."""
        self._shunned.discard(address)
        self._known_as.pop(address, None)
        if role is not None:
            self._known_as[address] = role
        link = self._links.get(address)
        if link is None:
            self._connect(address, listed=True)
            return
        link.set_listed(True)
        for worker in self._at(address):
            worker.leaving = self._mistaken(worker.info)
            if worker.leaving:
                log.warning("worker at %s cannot be used: %s", address, self._mistake(worker.info))

    def unfollow(self, address: str) -> None:
        """Looks for no worker there any more. One that is there gets no new requests, and is followed to its end."""
        self._shunned.add(address)
        link = self._links.get(address)
        if link is not None:
            link.set_listed(False)
        for worker in self._at(address):
            worker.leaving = True

    def _at(self, address: str) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.info.address == address]

    async def close(self) -> None:
        """Ends all links; every worker is gone afterwards."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def following(self) -> set[str]:
        """Addresses that are connected, or tried again."""
        return set(self._links)

    def prefill_workers(self) -> list[tuple[Incarnation, str]]:
        """Incarnation and address of every usable prefill worker, for decode workers to connect to."""
        return [(view.incarnation, view.info.address) for view in self.snapshot().prefill]

    def moves(self) -> list[MoveStat]:
        """KV moved, by pair and transport, over all decode workers ever seen: counters outlive workers."""
        latest = dict(self._past_moves)
        for worker in self._workers.values():
            latest.update(_by_pair(worker))
        return list(latest.values())

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
        link = Link(address, listed, self, self.router_id, self.lease_s, self._clock, self.trust)
        self._links[address] = link
        task = asyncio.create_task(link.run(), name=f"link-{address}")
        self._tasks[address] = task
        task.add_done_callback(lambda ended: self._link_ended(address, ended))

    def _link_ended(self, address: str, task: asyncio.Task[None]) -> None:
        del self._tasks[address]
        link = self._links.pop(address)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the link to worker %s failed", address, exc_info=error)
        elif not task.cancelled() and link.listed:  # again, in the moment in which it ended
            self._connect(address, listed=True)

    def _mistaken(self, info: WorkerInfo) -> bool:
        return self._known_as.get(info.address, info.role) is not info.role

    def _mistake(self, info: WorkerInfo) -> str:
        listed = self._known_as[info.address].value
        return f"it is listed as a {listed} worker and says that it is a {info.role.value} worker"

    def _check(self, info: WorkerInfo) -> None:
        if self._mistaken(info):
            raise Fenced(self._mistake(info), param="role")
        known = self.reference
        if known is None:
            return
        who = f"{info.role.value} worker {info.address}"
        if info.layout.has_drafter != known.layout.has_drafter:
            have, lack = (
                ("has a draft model", "have none") if info.layout.has_drafter else ("has no draft model", "have one")
            )
            raise Fenced(
                f"{who} {have} and the workers of this cluster {lack}; --draft-model must be the same on all of them",
                param="draft_model",
            )
        if info.model.fingerprint != known.model.fingerprint:
            raise Fenced(
                f"{who} serves model {info.model.name} with fingerprint {info.model.fingerprint}; "
                f"this cluster serves {known.model.name} with fingerprint {known.model.fingerprint}"
                + ("; the draft model counts" if known.layout.has_drafter else ""),
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
        worker = Worker(info, channel, self.booking_closed, self._clock())
        worker.leaving = info.address in self._shunned
        self.add(worker)
        self.reference = self.reference or info
        return worker

    def update(self, worker: Worker, update: WorkerUpdate) -> None:
        """See `observe`; the listener hears of a worker once."""
        self.observe(worker, update)
        if not worker.announced:
            worker.announced = True
            log.info("%s worker %s at %s is up", worker.info.role.value, worker.incarnation, worker.info.address)
            if self.listener is not None:
                self.listener.worker_up(worker)
        if update.status is not None and self.listener is not None:
            self.listener.worker_reported(update.status)

    def suspend(self, worker: Worker, reason: str, silent: bool = False) -> None:
        """Nothing new goes there, and nothing is believed of its cache, until it is found again.

        silent: for a whole lease.
        """
        self.lease_expiries[worker.info.role] += silent
        log.warning("%s worker %s at %s: %s", worker.info.role.value, worker.incarnation, worker.info.address, reason)
        self.lose_sight(worker)

    def gone(self, worker: Worker, reason: str) -> None:
        """Forgets an incarnation and tells the listener."""
        self._past_moves.update(_by_pair(worker))
        self.ends[worker.info.role, "goodbye" if worker.leaving else "lost"] += 1
        self.remove(worker)
        self._fold_past_moves()
        if not self._workers:  # all were exchanged, perhaps: nobody is left whom new ones would have to fit
            self.reference = None
        if self.listener is not None:
            self.listener.worker_gone(worker.incarnation, reason)

    def _fold_past_moves(self) -> None:
        """The oldest pairs become one by transport: counters do not go back, and workers that come and go cost no more.

        An incarnation that is found again after hundreds of others have gone counts twice.
        """
        past = [name for name in self._past_moves if name[1] != EARLIER]
        for name in past[: max(0, len(past) - MAX_PAST_PAIRS)]:
            old, into = self._past_moves.pop(name), (EARLIER, EARLIER, name[2])
            self._past_moves[into] = self._past_moves.get(into, MoveStat(*into)).plus(old)


def _by_pair(worker: Worker) -> dict[tuple[str, str, str], MoveStat]:
    return {(move.sender, move.receiver, move.transport): move for move in worker.status.moves}
