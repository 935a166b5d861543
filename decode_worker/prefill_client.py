"""The decode worker's side of its pairs: connects them, warms them, and tries a plan's prefill workers in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.base import FetchResult, SpanSink
from kvtransfer.inbound import PairClient
from tandem.cluster import Ticket, new_id
from tandem.errors import TandemError
from tandem.types import GenerateRequest, TokenIds

log = logging.getLogger(__name__)
MakePair = Callable[[str, str], PairClient]
"""(incarnation, address) -> a pair not yet connected."""


@dataclass(frozen=True, slots=True)
class Target:
    """A prefill worker of a plan."""

    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the hand-over of one request went, over all the senders that were tried."""

    sender_cached: int = 0
    """Tokens the last sender that took the ticket had cached."""
    tried: int = 0
    complete: bool = False
    sender: str = ""
    """The worker tried last."""


class PrefillClient:
    """One pair for each prefill worker's incarnation. A pair that broke is made anew when it is next needed."""

    def __init__(
        self,
        incarnation: str,
        layout_digest: str,
        make_pair: MakePair,
        queue_deadline_s: float,
        transfer_deadline_s: float,
        failed: Callable[[str], None],
        pair_failed: Callable[[str], None],
    ) -> None:
        """failed: told the stage of each failure. pair_failed: told the sender's incarnation."""
        self._incarnation = incarnation
        self._layout_digest = layout_digest
        self._make_pair = make_pair
        self._queue_deadline_s = queue_deadline_s
        self._transfer_deadline_s = transfer_deadline_s
        self._failed = failed
        self._pair_failed = pair_failed
        self._pairs: dict[str, PairClient] = {}
        self._connecting: dict[str, asyncio.Task[PairClient]] = {}
        self._warming: set[asyncio.Task[None]] = set()

    def discovered(self, workers: Sequence[tuple[str, str]]) -> None:
        """Warms pairs with prefill workers that a router named, so that no request pays for the first connection."""
        for incarnation, address in workers:
            if incarnation not in self._pairs and incarnation not in self._connecting:
                task = asyncio.create_task(self._warm(Target(incarnation, address)))
                self._warming.add(task)
                task.add_done_callback(self._warming.discard)

    async def _warm(self, target: Target) -> None:
        try:
            await self._pair(target)
        except TandemError as error:
            log.info("prefill worker %s is not reachable yet: %s", target.address, error)

    async def fetch(
        self, request: GenerateRequest, tokens: TokenIds, targets: Sequence[Target], sink: SpanSink
    ) -> Outcome:
        """Fetches the KV of `tokens` into `sink` from the first target that manages; never raises a TandemError."""
        sender_cached = 0
        for tried, target in enumerate(targets, start=1):
            try:
                pair = await self._pair(target)
                result = await pair.fetch(
                    self._ticket(request, target), tokens, request.salt, request.adapter, request.priority, sink
                )
            except TandemError as error:
                result = FetchResult(landed_until=0, error=str(error))
            sender_cached = max(sender_cached, result.sender_cached)
            if not result.error:
                return Outcome(sender_cached, tried, complete=True, sender=target.incarnation)
            self._failed("hand_over")
            self._pair_failed(target.incarnation)
            log.warning("hand-over of request %s from %s failed: %s", request.request_id, target.address, result.error)
        return Outcome(sender_cached, len(targets), complete=False, sender=targets[-1].incarnation if targets else "")

    def _ticket(self, request: GenerateRequest, target: Target) -> Ticket:
        return Ticket(
            ticket_id=new_id(),
            request_id=request.request_id,
            attempt=request.attempt,
            sender=target.incarnation,
            receiver=self._incarnation,
            layout_digest=self._layout_digest,
            queue_deadline_s=self._queue_deadline_s,
            transfer_deadline_s=self._transfer_deadline_s,
            tenant=request.tenant,
        )

    async def _pair(self, target: Target) -> PairClient:
        pair = self._pairs.get(target.incarnation)
        if pair is not None and not pair.closed:
            return pair
        self._pairs.pop(target.incarnation, None)
        task = self._connecting.get(target.incarnation)
        if task is None:
            task = asyncio.create_task(self._connect(target))
            self._connecting[target.incarnation] = task
            task.add_done_callback(lambda _: self._connecting.pop(target.incarnation, None))
        # One request giving up must not end a connection that others wait for.
        return await asyncio.shield(task)

    async def _connect(self, target: Target) -> PairClient:
        pair = self._make_pair(target.incarnation, target.address)
        try:
            await pair.connect()
        except asyncio.CancelledError:
            await pair.close()  # nobody else knows of it
            raise
        # A pair that is over, of a worker that was restarted perhaps, would hold its slab's memory for ever.
        self._pairs = {name: old for name, old in self._pairs.items() if not old.closed or old.leaks()}
        self._pairs[target.incarnation] = pair
        return pair

    async def close(self) -> None:
        """Closes every pair."""
        pending = [*self._connecting.values(), *self._warming]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.gather(*(pair.close() for pair in self._pairs.values()))
        self._pairs.clear()

    def leaks(self) -> list[str]:
        """Tickets, grants and ranges still out."""
        return [leak for pair in self._pairs.values() for leak in pair.leaks()]
