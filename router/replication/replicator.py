"""Copies popular prefixes to more workers: what `decide` wants, within bounds, and what came of each."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.explain.recorder import Recorder
from router.explain.story import Copy
from router.open_request import OpenRequest
from router.policies.base import Matches, RequestInfo
from router.replication.decide import Replica, wanted
from router.replication.dispatch import Copied
from router.replication.heat import PrefixHeat
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from router.workers.pairs import PairHealth
from router.workers.snapshot import FleetSnapshot
from tandem.cluster import Candidate, Incarnation
from tandem.errors import TandemError
from tandem.kv import BlockHash
from tandem.obs import REPLICA_BYTES_TOTAL, REPLICAS_RUNNING, REPLICAS_TOTAL
from tandem.types import TokenIds

log = logging.getLogger(__name__)

MAX_PREFIXES = 65_536
"""Prefixes whose requests are counted."""
AGAIN_S = 2.0
"""A prefix that was just copied is not copied to the same worker again before its events must have come."""
FAILED_S = 10.0
"""One whose copy failed is not tried again so soon."""

CopyTo = Callable[[Worker, Worker, TokenIds, str, str], Awaitable[Copied]]
"""(target, source, tokens, salt, adapter); raises a TandemError."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of all copies that one router has made."""

    at_once: int
    """0 makes none."""
    bytes_per_s: float


class Replicator:
    """All methods run on the event loop. clock: seconds, monotonic."""

    def __init__(
        self,
        bounds: Bounds,
        fleet: Fleet,
        pairs: PairHealth,
        recorder: Recorder,
        copy: CopyTo,
        clock: Callable[[], float],
    ) -> None:
        self.heat = PrefixHeat(MAX_PREFIXES, clock)
        self._bounds = bounds
        self._fleet = fleet
        self._pairs = pairs
        self._recorder = recorder
        self._copy = copy
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], tuple[Incarnation, Incarnation]] = {}
        self._not_before: dict[tuple[BlockHash, Incarnation], float] = {}
        self._allowance, self._allowed_at = bounds.bytes_per_s, clock()
        self._outcomes: Counter[str] = Counter()
        self._bytes = 0

    def placed(
        self, record: OpenRequest, info: RequestInfo, fleet: FleetSnapshot, matches: Matches, chosen: Candidate
    ) -> None:
        """A request was sent to a pair: its prefix may be one that more workers should have."""
        if not self._bounds.at_once:
            return
        hashes = record.chain.hashes
        self.heat.asked(hashes)
        if not matches or len(self._tasks) >= self._bounds.at_once or self._spend(0) < 0:
            return
        counts = self.heat.counts(hashes)
        replica = wanted(info, fleet, matches, chosen, counts, self._pairs.broken(), self._clock())
        if replica is not None:
            self._start(record, replica)

    def _start(self, record: OpenRequest, replica: Replica) -> None:
        """Makes a copy, unless it was just made, or just failed."""
        source, target = self._fleet.worker(replica.source), self._fleet.worker(replica.target)
        now, key = self._clock(), (record.chain.hashes[replica.blocks - 1], replica.target)
        self._not_before = {name: until for name, until in self._not_before.items() if until > now}
        if source is None or target is None or key in self._not_before:
            return
        self._spend(replica.bytes)
        self._not_before[key] = float("inf")
        told = Copy(replica.source, replica.target, replica.tokens, replica.terms)
        self._recorder.copying(record.story, told)
        request = record.request
        run = self._run(told, target, source, request.prompt[: replica.tokens], request.salt, request.adapter)
        task = asyncio.create_task(run, name=f"copy-{replica.target}")
        self._tasks[task] = replica.source, replica.target

        def ended(task: asyncio.Task[None]) -> None:
            # Not in the task: one that is cancelled before its first step runs no line of it.
            del self._tasks[task]
            told.state = "cancelled" if told.state == "running" else told.state
            self._outcomes[told.state] += 1
            self._not_before[key] = self._clock() + (AGAIN_S if told.state == "done" else FAILED_S)

        task.add_done_callback(ended)

    async def _run(self, told: Copy, target: Worker, source: Worker, tokens: TokenIds, salt: str, adapter: str) -> None:
        try:
            copied = await self._copy(target, source, tokens, salt, adapter)
        except TandemError as error:
            told.state, told.error = "failed", str(error)
            log.info("%d tokens were not copied to %s: %s", len(tokens), target.info.address, error)
        else:
            told.state = "done"
            told.moved_tokens, told.bytes, told.ms = copied.moved_tokens, copied.bytes, copied.seconds * 1e3
            self._bytes += copied.bytes

    def _spend(self, size: int) -> float:
        """Takes bytes out of the allowance, which fills with time; what is left of it. One copy may overdraw it."""
        now, most = self._clock(), self._bounds.bytes_per_s
        self._allowance = min(self._allowance + (now - self._allowed_at) * most, most) - size
        self._allowed_at = now
        return self._allowance

    def worker_gone(self, incarnation: Incarnation) -> None:
        """Copies from it and to it end."""
        for task, ends in self._tasks.items():
            if incarnation in ends:
                task.cancel()

    async def close(self) -> None:
        """Ends all copies."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def running(self) -> int:
        """Copies under way."""
        return len(self._tasks)

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Copies so far, by how they ended: done, failed, cancelled."""
        return self._outcomes

    def collect(self) -> Iterable[Metric]:
        """For the metrics page."""
        total = CounterMetricFamily(
            REPLICAS_TOTAL.removesuffix("_total"), "copies of prefixes, by how they ended", labels=["outcome"]
        )
        for outcome in ("done", "failed", "cancelled"):
            total.add_metric([outcome], self._outcomes[outcome])
        yield total
        name = REPLICA_BYTES_TOTAL.removesuffix("_total")
        yield CounterMetricFamily(name, "KV bytes of prefixes that were copied", value=self._bytes)
        yield GaugeMetricFamily(REPLICAS_RUNNING, "copies of prefixes under way", value=len(self._tasks))
