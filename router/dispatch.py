"""Takes requests to the decode worker a plan names, and their tokens back to who asked.

A request goes through `Admission`, then `Placer` (which plans, and has `Submitter` submit), and is open until it ends
(`OpenRequests`). Its tokens come by the worker's stream to `Deltas`; when its worker cannot go on, `Moves` places it
again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType

from prometheus_client.core import CounterMetricFamily, Metric

from router.admission.gate import Admission
from router.admission.quota import Quotas
from router.backend import Reader
from router.cache.prefix_index import PrefixIndex
from router.cache.tails import TailMemory
from router.dispatch_cancels import Cancels
from router.dispatch_deltas import Deltas
from router.dispatch_stream import WorkerStream
from router.dispatch_submit import Reply, Submitter
from router.explain.ladder import HitLadder
from router.explain.recorder import Recorder
from router.moves import Moves
from router.open_request import Chain, OpenRequest
from router.open_requests import OpenRequests
from router.placer import Placer
from router.policies import Policy
from router.quarantine import Quarantine
from router.replication.dispatch import copy
from router.replication.replicator import Bounds, Replicator
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from router.workers.pairs import PairHealth
from tandem.cluster import Incarnation, Plan, Role, Status, WorkerInfo
from tandem.config import RouterConfig
from tandem.errors import BadRequest, Unavailable
from tandem.kv import HashRoot, block_hashes
from tandem.obs import REQUESTS_MOVED_TOTAL
from tandem.types import FinishReason, GenerateRequest, ModelInfo

CLOSE_S = 2.0
"""What workers get to hear of cancellations when the router stops; their lease ends the rest."""

MIB = 1 << 20
MAX_TAILS = 65_536
"""Finished sequences whose last, partial block is remembered."""
BLOCKS_PER_TAIL = 16
"""A small index keeps fewer: without the blocks before it, a tail says nothing."""


class Accepted:
    """A request that a decode worker has taken. As a context manager it cancels on exit what has not finished."""

    def __init__(self, record: OpenRequest, plan: Plan, reply: Reply, dispatcher: Dispatcher) -> None:
        self.plan = plan
        self.reply = reply
        self._record = record
        self._dispatcher = dispatcher

    async def follow(self, reader: Reader) -> None:
        """See `router.backend.Accepted`. One reader."""
        await self._record.follow(reader)

    async def cancel(self) -> None:
        """Ends all open choices, here at once and then on the worker; idempotent."""
        await self._dispatcher.cancel(self._record)

    async def __aenter__(self) -> Accepted:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()


class Dispatcher:
    """The cluster as one endpoint: admits, places, streams, cancels. All methods run on the event loop."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        index: PrefixIndex,
        policy: Policy,
        recorder: Recorder,
        ladder: HitLadder,
        quotas: Quotas,
        clock: Callable[[], float],
    ) -> None:
        self.fleet = fleet
        self.tails = TailMemory(min(MAX_TAILS, 1 + config.index_max_blocks // BLOCKS_PER_TAIL), clock)
        self._config = config
        self._index = index
        self._recorder = recorder
        self._clock = clock
        self._quotas = quotas
        self.pairs = PairHealth(clock)
        self._quarantine = Quarantine(clock)
        self.admission = Admission(config.max_inflight, config.max_queued, config.queue_s, self._room, clock)
        self._streams: dict[Incarnation, WorkerStream] = {}
        self._cancels = Cancels(fleet)
        self._requests = OpenRequests(fleet, self.admission, self._cancels, self.tails, ladder, clock)
        bounds = Bounds(config.replicas if config.policy == "cost" else 0, config.replicas_mib_s * MIB)
        self._replicator = Replicator(bounds, fleet, self.pairs, recorder, copy, clock)
        self._placer = Placer(
            config.retries,
            fleet,
            index,
            self.tails,
            self.pairs,
            policy,
            recorder,
            ladder,
            self._requests,
            Submitter(fleet, self._requests, self._cancels, self._streams, clock),
            self._replicator,
            self._quarantine,
            clock,
        )
        self.moves = Moves(self._requests, self._placer, self._quarantine)
        self._deltas = Deltas(fleet, self._requests, self._cancels, self.moves)
        self._model: ModelInfo | None = None
        fleet.listener = self

    @property
    def model(self) -> ModelInfo | None:
        """The model served, under the name clients use; None until a decode worker is known."""
        return self._model

    @property
    def inflight(self) -> int:
        """Requests admitted and not yet ended."""
        return self.admission.inflight

    def address_of(self, incarnation: Incarnation) -> str | None:
        """host:port of a worker; None when it is gone."""
        worker = self.fleet.worker(incarnation)
        return None if worker is None else worker.info.address

    def ready(self) -> bool:
        """Whether a request could be served now."""
        return any(not view.draining for view in self.fleet.snapshot().decode)

    async def submit(self, request: GenerateRequest) -> Accepted:
        """Returns when a decode worker has taken the request.

        Raises BadRequest (and ContextTooLong), Overloaded or Unavailable; then no worker runs it.
        """
        reference = self._check(request)
        self._quarantine.check(request)
        story = self._recorder.begin(request)
        try:
            await self.admission.enter(request.request_id, request.priority, request.tenant)
        except BaseException as error:
            story.error, story.ended_s = str(error), self._clock()
            raise
        story.admitted_s = self._clock()
        chain = self._chain(request, reference)
        record = OpenRequest(request, self._config.stream_queue, chain, story, self._clock)
        self._requests.add(record)
        try:
            plan, reply = await self._placer.place(record)
            self.admission.placed(request.request_id)
        except BaseException as error:
            record.story.error = str(error)
            self._requests.close(record)
            raise
        return Accepted(record, plan, reply, self)

    async def cancel(self, record: OpenRequest) -> None:
        """Ends a request here at once, and returns when its worker has let go of it; nothing if it has ended."""
        task = self._requests.end(record, FinishReason.CANCELLED)
        if task is not None:
            # Unlike awaiting it: the worker hears of it even if who waits here is cancelled, and who waits here is not
            # cancelled when the worker's channel closes, which cancels its calls.
            await asyncio.wait([task])

    def _room(self) -> float:
        """Requests that may be sent to decode workers before each has its backlog; without workers, waiting is vain."""
        views = [view for view in self.fleet.snapshot().decode if not view.draining]
        waiting = (max(view.sequences - view.status.running, 0) for view in views)
        return sum(max(self._config.worker_backlog - count, 0) for count in waiting) if views else math.inf

    def _check(self, request: GenerateRequest) -> WorkerInfo:
        reference = self.fleet.reference
        if reference is None:
            raise Unavailable("no worker is connected; try again later")
        vocabulary = reference.model.vocab_size
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < vocabulary:
                raise BadRequest(f"prompt has token id {token}; it must be in [0, {vocabulary})", param="prompt")
        return reference

    def _chain(self, request: GenerateRequest, reference: WorkerInfo) -> Chain:
        root = HashRoot(
            cluster_key=self._config.cluster_key,
            model_fingerprint=reference.model.fingerprint,
            kv_dtype=reference.kv_dtype,
            adapter=request.adapter,
            salt=request.salt,
        ).digest()
        return Chain(root, tuple(block_hashes(root, request.prompt)))

    # What the fleet tells -------------------------------------------------------------------------------------------

    def worker_up(self, worker: Worker) -> None:
        """Opens the token stream of a new decode worker."""
        if worker.info.role is Role.DECODE:
            if not self._streams:  # the only one now: those before may have served something else
                model, config = worker.info.model, self._config
                self._model = replace(
                    model, name=config.served_model_name or model.name, path=config.model or model.path
                )
            self._streams[worker.incarnation] = WorkerStream(
                worker, self.fleet.router_id, self.fleet.lease_s, self._deltas
            )

    def worker_reported(self, status: Status) -> None:
        """A worker has told its load, and what tenants use of it."""
        self._quotas.observe(status)
        self.pairs.observe(status)
        self.admission.wake()

    def worker_gone(self, incarnation: Incarnation, reason: str) -> None:
        """What it ran goes on elsewhere. What it had not answered yet does so when its call fails."""
        self._quotas.forget(incarnation)
        self.pairs.forget(incarnation)
        self._replicator.worker_gone(incarnation)
        self.admission.wake()
        self.tails.drop(incarnation)
        stream = self._streams.pop(incarnation, None)
        if stream is not None:
            stream.close()
        for record in self._requests.taken_by(incarnation):
            self.moves.go_on(record, f"the decode worker was lost: {reason}", crashed=True)

    # End of all -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends every request with an error and tells the workers."""
        for record in self._requests:
            self._requests.end(record, FinishReason.ERROR, "the router is shutting down")
        self.moves.close()
        await self._replicator.close()
        await self._cancels.settle(CLOSE_S)
        for stream in self._streams.values():
            stream.close()

    def collect(self) -> Iterable[Metric]:
        """For the metrics page."""
        name = REQUESTS_MOVED_TOTAL.removesuffix("_total")
        yield CounterMetricFamily(name, "requests that went on at another decode worker", value=self.moves.moved)
        yield from self._replicator.collect()

    def leaks(self) -> list[str]:
        """What is still held; empty when idle."""
        held = [f"request {record.request.request_id} is open" for record in self._requests]
        held += [f"{count} {what}" for what, count in self._counters().items() if count]
        return held

    def _counters(self) -> dict[str, int]:
        return {
            "requests in flight": self.admission.inflight,
            "requests waiting": self.admission.queued,
            "bookings": self.fleet.bookings(),
            "predictions": len(self._index.predictions),
            "calls under way": len(self._cancels),
            "copies": self._replicator.running,
        }
