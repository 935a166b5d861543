"""The router's bound on open requests, and the queue of those that wait behind it.

Workers, who see every router's requests, do the ordering; here no more are let in than they can use. Who waits longer
than the deadline would get its answer too late, and leaves; when the queue is full, one of the lowest priority goes,
the newest of the tenant that has most waiting. So under any load, what is served is served in time.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tandem.errors import Overloaded, Unavailable

MAX_RETRY_S = 60.0
REFUSALS = ("full", "late")
"""The queue had no place, or its deadline passed."""


@dataclass(slots=True, eq=False)
class _Waiting:
    request_id: str
    priority: int
    tenant: str
    number: int
    since: float
    entered: asyncio.Future[None]


class Admission:
    """Lets requests in, by priority, then the tenant with the fewest inside, then arrival.

    max_inflight: requests inside. max_queued: requests waiting; 0 refuses instead. deadline_s: longest wait.
    room: how many more requests workers can use now, those admitted but not yet `placed` included. clock: seconds,
    monotonic.
    """

    def __init__(
        self,
        max_inflight: int,
        max_queued: int,
        deadline_s: float,
        room: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self.max_inflight = max_inflight
        self.max_queued = max_queued
        self.refused: Counter[str] = Counter()
        """Requests refused here so far, by cause."""
        self._deadline_s = deadline_s
        self._room = room
        self._clock = clock
        self._inside: dict[str, str] = {}
        self._tenants: Counter[str] = Counter()
        self._unplaced: set[str] = set()
        self._queue: dict[int, _Waiting] = {}
        self._arrivals = 0

    @property
    def inflight(self) -> int:
        """Requests admitted and not yet ended."""
        return len(self._inside)

    @property
    def queued(self) -> int:
        """Requests waiting."""
        return len(self._queue)

    @property
    def oldest_s(self) -> float:
        """How long the request that has waited longest has; 0 when none waits."""
        return max((self._clock() - waiting.since for waiting in self._queue.values()), default=0.0)

    async def enter(self, request_id: str, priority: int = 0, tenant: str = "") -> None:
        """Returns when the request is admitted.

        Raises Overloaded when the queue has no place for it, Unavailable at the deadline, and ValueError if the id is
        already in.
        """
        if self.enter_at_once(request_id, tenant):
            return
        self._arrivals += 1
        future = asyncio.get_running_loop().create_future()
        me = _Waiting(request_id, priority, tenant, self._arrivals, self._clock(), future)
        self._queue[me.number] = me
        if len(self._queue) > self.max_queued:
            self._shed()
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                await me.entered
        except BaseException as error:
            self._queue.pop(me.number, None)
            self.leave(request_id)  # it may have been admitted in the moment in which its caller gave up
            if isinstance(error, TimeoutError) and limit.expired():
                raise self._late() from None
            raise

    def enter_at_once(self, request_id: str, tenant: str = "") -> bool:
        """Admits a request if it need not wait. Raises ValueError if the id is already in."""
        if request_id in self._inside:
            raise ValueError(f"request_id {request_id} is already in flight")
        if self._queue or not self._open():
            return False
        self._admit(request_id, tenant)
        return True

    def leave(self, request_id: str) -> None:
        """The request ended; a second time does nothing."""
        tenant = self._inside.pop(request_id, None)
        self._unplaced.discard(request_id)
        if tenant is not None:
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]
            self.wake()

    def placed(self, request_id: str) -> None:
        """The request is with a worker, whose load tells of it from now on: until here it counted twice."""
        self._unplaced.discard(request_id)
        self.wake()

    def wake(self) -> None:
        """Something changed: lets in who can be."""
        while self._queue and self._open():
            best = min(self._queue.values(), key=lambda w: (-w.priority, self._tenants[w.tenant], w.number))
            del self._queue[best.number]
            if best.entered.done():
                continue
            if self._clock() - best.since > self._deadline_s:
                best.entered.set_exception(self._late())  # its timer is late, too
            else:
                self._admit(best.request_id, best.tenant)
                best.entered.set_result(None)

    def _late(self) -> Unavailable:
        self.refused["late"] += 1
        text = f"the request waited {self._deadline_s:g} s, which is the most; the cluster is full"
        return Unavailable(text, retry_s=self._retry_s())

    def _open(self) -> bool:
        return len(self._inside) < self.max_inflight and self._room() > len(self._unplaced)

    def _admit(self, request_id: str, tenant: str) -> None:
        self._inside[request_id] = tenant
        self._unplaced.add(request_id)
        self._tenants[tenant] += 1

    def _shed(self) -> None:
        """Refuses, of the lowest priority, the newest of the tenant with most waiting: a flood displaces itself."""
        lowest = min(waiting.priority for waiting in self._queue.values())
        level = [waiting for waiting in self._queue.values() if waiting.priority == lowest]
        counts = Counter(waiting.tenant for waiting in level)
        victim = max(level, key=lambda w: (counts[w.tenant], w.number))
        del self._queue[victim.number]
        if not victim.entered.done():
            self.refused["full"] += 1
            retry = self._retry_s()
            text = f"{len(self._inside)} requests are in flight and {len(self._queue)} wait, which is the most"
            victim.entered.set_exception(Overloaded(f"{text}; try again in {retry:g} s", retry_s=retry))

    def _retry_s(self) -> float:
        """About how long the queue is: what its oldest has waited."""
        return min(max(math.ceil(self.oldest_s), 1.0), MAX_RETRY_S)

    def check_integrity(self) -> None:
        """Raises AssertionError when a bound or a count is broken; for tests."""
        assert len(self._inside) <= self.max_inflight
        assert len(self._queue) <= self.max_queued
        assert self._unplaced <= self._inside.keys()
        assert self._tenants == Counter(self._inside.values())
        assert all(not waiting.entered.done() for waiting in self._queue.values())
        assert not self._queue or not self._open()
