"""Finds a decode worker that takes a request: the plan's, then others, each planned anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from router.cache.prefix_index import PrefixIndex
from router.cache.tails import TailMemory
from router.dispatch_submit import Reply, Submitter
from router.explain.ladder import HitLadder
from router.explain.recorder import Recorder
from router.open_request import Chain, OpenRequest
from router.open_requests import OpenRequests
from router.policies import Policy, RequestInfo
from router.quarantine import Quarantine
from router.replication.replicator import Replicator
from router.workers.fleet import Fleet
from router.workers.pairs import PairHealth, avoiding
from router.workers.snapshot import WorkerView
from tandem.cluster import Incarnation, Plan
from tandem.errors import ContextTooLong, Fenced, Internal, Overloaded, TandemError, Unavailable, WorkerLost
from tandem.kv import block_hashes
from tandem.types import GenerateRequest

log = logging.getLogger(__name__)

MAX_CRASHES = 2
"""Workers that may die over one request before it is refused: it may be what killed them."""

Elsewhere = (Overloaded, Unavailable, Fenced, WorkerLost, Internal)
"""Refusals that another worker may not share."""


def _larger_than(refusing: Incarnation, others: Sequence[WorkerView]) -> bool:
    """Whether some worker has room for more tokens than the one that refused a request as too long."""
    least = min((view.info.capacity_tokens for view in others if view.incarnation == refusing), default=0)
    return any(view.info.capacity_tokens > least and not view.draining for view in others)


def _refusal(errors: Sequence[TandemError]) -> TandemError:
    """What a client is told when nobody took its request: to come back later."""
    for kind in (Overloaded, ContextTooLong):
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[-1] if isinstance(errors[-1], Unavailable) else Unavailable(str(errors[-1]))


class Placer:
    """Plans and submits until somebody takes the request. clock: seconds, monotonic."""

    def __init__(
        self,
        retries: int,
        fleet: Fleet,
        index: PrefixIndex,
        tails: TailMemory,
        pairs: PairHealth,
        policy: Policy,
        recorder: Recorder,
        ladder: HitLadder,
        requests: OpenRequests,
        submitter: Submitter,
        replicator: Replicator,
        quarantine: Quarantine,
        clock: Callable[[], float],
    ) -> None:
        """retries: other workers that are asked when the first refuses."""
        self._retries = retries
        self._fleet = fleet
        self._index = index
        self._tails = tails
        self._pairs = pairs
        self._policy = policy
        self._recorder = recorder
        self._ladder = ladder
        self._requests = requests
        self._submitter = submitter
        self._replicator = replicator
        self._quarantine = quarantine
        self._clock = clock
        self._ordinal = 0

    async def place(self, record: OpenRequest, without: Incarnation | None = None) -> tuple[Plan, Reply]:
        """Finds a decode worker that takes the request: the plan's, then others, each planned anew.

        without: a worker not to be asked.
        """
        request = record.request
        info = self._info(request)
        # The prompt's log-probabilities need every position computed, and where sampling is: no cache, no hand-over.
        scores = request.sampling.prompt_logprobs is not None
        refused: dict[Incarnation, TandemError] = {}
        for _ in range(self._retries + 1):
            self._requests.check_open(record)
            fleet = self._fleet.snapshot().without({*refused, *([without] if without else ())})
            if scores:
                fleet = replace(fleet, prefill=())
            if refused and all(view.draining for view in fleet.decode):
                break
            matches = {} if scores else self._matches(record)
            plan = avoiding(self._policy.plan(info, fleet, matches, self._clock()), self._pairs.broken())
            log.debug("plan of %s, cached %s: %s", request.request_id, matches, plan.candidates)
            self._recorder.planned(record.story, plan, matches)
            if record.rungs is None and self._ladder.on and not scores:
                best, capacity = max(matches.values(), default=0), fleet.capacity_tokens
                record.rungs = self._ladder.planned(record.chain.hashes, len(request.prompt), best, capacity)
            try:
                reply = await self._submitter.submit(record, info, plan)
                if not scores and without is None:
                    self._replicator.placed(record, info, fleet, matches, plan.candidates[0])
                return plan, reply
            except ContextTooLong as error:
                if not _larger_than(plan.decode, fleet.decode):
                    raise
                record.story.refused(error)
                refused[plan.decode] = error
                record.next_attempt()
            except Elsewhere as error:
                log.info("decode worker %s does not take %s: %s", plan.decode, request.request_id, error)
                record.story.refused(error)
                refused[plan.decode] = error
                record.losses += isinstance(error, WorkerLost)
                if record.losses >= MAX_CRASHES:  # even if its client has gone meanwhile
                    self._quarantine.add(record.request)
                self._requests.check_open(record)
                record.next_attempt()
            if record.losses >= MAX_CRASHES:
                raise WorkerLost(f"{MAX_CRASHES} decode workers were lost over this request")
        raise _refusal(list(refused.values()))

    def _info(self, request: GenerateRequest) -> RequestInfo:
        self._ordinal += 1
        made = len(request.made(request.lead))
        return RequestInfo(
            request.request_id,
            len(request.prompt) + made,
            request.sampling.max_tokens - made,
            request.choices - len(request.ended),
            self._ordinal,
        )

    def _matches(self, record: OpenRequest) -> dict[Incarnation, int]:
        """Tokens of prompt and output so far that each worker is believed to have cached."""
        chain, known = record.chain, record.request.known
        if len(known) > len(record.request.prompt):
            chain = Chain(chain.root, tuple(block_hashes(chain.root, known)))
        return self._tails.extend(self._index.match(chain.hashes), chain, known)
