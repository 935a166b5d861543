"""The requests that are open on this router, and what the end of one leaves behind. Each ends exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from router.admission.gate import Admission
from router.cache.tails import TailMemory
from router.dispatch_cancels import Cancels
from router.explain.ladder import HitLadder
from router.open_request import OpenRequest
from router.workers.fleet import Fleet
from router.workers.snapshot import Load
from tandem.cluster import Incarnation
from tandem.errors import Unavailable
from tandem.types import FinishReason


class OpenRequests:
    """Admitted requests by id, until they have ended. clock: seconds, monotonic."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        cancels: Cancels,
        tails: TailMemory,
        ladder: HitLadder,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._cancels = cancels
        self._tails = tails
        self._ladder = ladder
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}

    def __iter__(self) -> Iterator[OpenRequest]:
        """All of them; they may end meanwhile."""
        return iter(list(self._open.values()))

    def add(self, record: OpenRequest) -> None:
        """Takes in a request that was admitted."""
        self._open[record.request.request_id] = record

    def get(self, request_id: str) -> OpenRequest | None:
        """The request of that id; None if it has ended."""
        return self._open.get(request_id)

    def has(self, record: OpenRequest) -> bool:
        """Whether it has not ended."""
        return self._open.get(record.request.request_id) is record

    def taken_by(self, incarnation: Incarnation) -> list[OpenRequest]:
        """Those that a decode worker has said it took."""
        return [record for record in self._open.values() if record.decode == incarnation and record.answered]

    def check_open(self, record: OpenRequest) -> None:
        """Raises Unavailable for a request that ended while a worker was looked for, or before it said it took it."""
        if record.finished:
            self.close(record)
        if not self.has(record):
            raise Unavailable("the request has ended")

    def release(self, record: OpenRequest) -> bool:
        """Ends the bookings; whether the decode worker's was open: its last status does not include the request."""
        unreported = self._fleet.release(record.decode_booking)
        self._fleet.release(record.prefill_booking)
        record.decode_booking = record.prefill_booking = None
        return unreported

    def end(self, record: OpenRequest, reason: FinishReason, error: str = "") -> asyncio.Task[None] | None:
        """Ends a request that its worker still runs; None if it has ended."""
        if record.finished:
            return None
        record.end(reason, error)
        self.close(record)
        if record.decode is None:
            return None
        return self._cancels.send(record.decode, record.request.request_id, record.request.attempt)

    def close(self, record: OpenRequest) -> None:
        """Forgets a request; what it was sent stays readable."""
        unreported = self.release(record)
        request = record.request
        if not self.has(record):
            return
        del self._open[request.request_id]
        ran = record.decode if record.answered else None
        if ran is not None and not unreported:
            # Choices that had ended before it went on there were never that worker's.
            self._fleet.ended(ran, Load(sequences=request.choices - len(request.ended)))
        self._admission.leave(request.request_id)  # behind that: who waits for its place is let in by what is left
        record.story.ended_s = self._clock()
        chain, capacity, usage = record.chain, self._fleet.snapshot().capacity_tokens, record.story.usage.get(0)
        made = record.behind_blocks()
        self._ladder.answered(record.rungs, usage, chain.root, chain.hashes, made, capacity)
        if ran is not None and self._fleet.worker(ran) is not None:
            for tokens in made:
                self._tails.remember(ran, chain, tokens)
