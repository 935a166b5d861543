"""The decode worker's hand-overs: a plan's prefill workers are tried in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.base import FetchResult, SpanSink
from kvtransfer.pairs import PairPool, Target
from tandem.cluster import Ticket, new_id
from tandem.errors import Overloaded, TandemError, Unavailable
from tandem.types import GenerateRequest, TokenIds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the hand-over of one request went, over all the senders that were tried."""

    sender_cached: int = 0
    """Tokens the last sender that took the ticket had cached."""
    tried: int = 0
    complete: bool = False
    sender: str = ""
    """The worker tried last."""
    bytes: int = field(default=0, compare=False)
    arrived_at: float = field(default=0.0, compare=False)
    """When the last of it had come (seconds of the event loop); 0 if nothing has."""
    failures: tuple[tuple[float, str, str], ...] = field(default=(), compare=False)
    """When (seconds of the event loop), by whom (incarnation) and why it was not handed over."""


class PrefillClient:
    """Fetches the KV of prompts from whoever computes it."""

    def __init__(
        self,
        incarnation: str,
        layout_digest: str,
        pairs: PairPool,
        queue_deadline_s: float,
        transfer_deadline_s: float,
        failed: Callable[[str], None],
        pair_failed: Callable[[str], None],
    ) -> None:
        """failed: told the stage of each failure. pair_failed: told of each sender that cannot be reached."""
        self._incarnation = incarnation
        self._layout_digest = layout_digest
        self._pairs = pairs
        self._queue_deadline_s = queue_deadline_s
        self._transfer_deadline_s = transfer_deadline_s
        self._failed = failed
        self._pair_failed = pair_failed

    async def fetch(
        self,
        request: GenerateRequest,
        tokens: TokenIds,
        targets: Sequence[Target],
        sink: SpanSink,
        trace: tuple[str, str] = ("", ""),
    ) -> Outcome:
        """Fetches the KV of `tokens` into `sink` from the first target that manages; never raises a TandemError.

        trace: what the senders' spans belong to (`traceparent`, `tracestate`).
        """
        sender_cached, size, arrived = 0, 0, 0.0
        failures: list[tuple[float, str, str]] = []
        for tried, target in enumerate(targets, start=1):
            try:
                pair = await self._pairs.pair(target)
                result = await pair.fetch(
                    self._ticket(request, target, trace), tokens, request.salt, request.adapter, request.priority, sink
                )
            except TandemError as error:
                # A new pair that there is no slab for stays so for a while; what a ticket is refused is a result.
                unreachable = isinstance(error, Unavailable | Overloaded)
                result = FetchResult(landed_until=0, error=str(error), link_failed=unreachable)
            sender_cached, size = max(sender_cached, result.sender_cached), size + result.bytes
            arrived = max(arrived, result.arrived_at)
            if not result.error:
                return Outcome(sender_cached, tried, True, target.incarnation, size, arrived, tuple(failures))
            failures.append((asyncio.get_running_loop().time(), target.incarnation, result.error))
            self._failed("hand_over")
            if result.link_failed:
                self._pair_failed(target.incarnation)
            log.warning("hand-over of request %s from %s failed: %s", request.request_id, target.address, result.error)
        last = targets[-1].incarnation if targets else ""
        return Outcome(sender_cached, len(targets), False, last, size, arrived, tuple(failures))

    def _ticket(self, request: GenerateRequest, target: Target, trace: tuple[str, str]) -> Ticket:
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
            traceparent=trace[0],
            tracestate=trace[1],
        )
