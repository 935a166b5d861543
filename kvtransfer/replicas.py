"""Copies of prefixes: what a router wants in this worker's cache, too, is fetched from a worker that has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

import grpc.aio

from kvtransfer.base import FetchResult, Identity, SpanSink
from kvtransfer.pairs import PairPool, Target
from tandem.cluster import Ticket, new_id
from tandem.errors import Fenced, Overloaded, TandemError, Unavailable
from tandem.types import TokenIds
from tandem.wire.failures import abort_with
from tandem.wire.v1 import handover_pb2 as pb
from tandem.wire.v1 import handover_pb2_grpc as rpc

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Prefixes that come to one worker at once; a router that wants more is told to come back."""
LEAST_PRIORITY = -(1 << 31)
"""Of a ticket: every request's goes before it."""


class ReplicaSink(SpanSink, Protocol):
    """A `SpanSink` that leaves what lands to the prefix cache."""

    @property
    def moved_tokens(self) -> int:
        """Tokens whose KV has come."""

    async def cached(self) -> int:
        """Tokens of the prefix that are cached here now."""

    async def close(self) -> None:
        """Called once at the end, however it came."""


MakeSink = Callable[[str, TokenIds, str, str], ReplicaSink]
"""(id, tokens of the prefix, salt, adapter) -> where it lands."""


class ReplicationService(rpc.ReplicationServicer):
    """`Replication` of proto/tandem/wire/v1/handover.proto."""

    def __init__(
        self,
        me: Identity,
        pairs: PairPool,
        sink: MakeSink,
        queue_deadline_s: float,
        transfer_deadline_s: float,
        ended: Callable[[], None],
    ) -> None:
        """The deadlines are those of a ticket. ended: called after each copy: cache and free pages have changed."""
        self.draining = False
        """Whether to refuse: nobody will use what comes."""
        self._me = me
        self._pairs = pairs
        self._sink = sink
        self._deadlines = queue_deadline_s, transfer_deadline_s
        self._ended = ended
        self._running: dict[str, TokenIds] = {}

    def attach(self, server: grpc.aio.Server) -> None:
        """Makes `server` answer the calls of `Replication`."""
        rpc.add_ReplicationServicer_to_server(self, server)

    async def Replicate(
        self, request: pb.ReplicateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReplicateReply:
        """Answers when the prefix is cached here; who cancels the call ends it."""
        name, tokens = new_id(), tuple(request.tokens)
        try:
            self._check(request, tokens)
            self._running[name] = tokens
            try:
                return await self._fetch(name, tokens, request)
            finally:
                del self._running[name]
        except TandemError as error:
            await abort_with(context, error)
        raise AssertionError("abort raises")

    def _check(self, request: pb.ReplicateRequest, tokens: TokenIds) -> None:
        if request.incarnation != self._me.incarnation:
            raise Fenced(f"this worker is {self._me.incarnation}, not {request.incarnation}")
        if self.draining:
            raise Unavailable("this worker is draining")
        if not tokens or request.source == self._me.incarnation:
            raise Fenced("a prefix of at least one token is needed, and another worker that has it")
        if len(self._running) >= AT_ONCE or tokens in self._running.values():
            raise Overloaded(f"{len(self._running)} prefixes are on their way here; at most {AT_ONCE} are, each once")

    async def _fetch(self, name: str, tokens: TokenIds, request: pb.ReplicateRequest) -> pb.ReplicateReply:
        sink = self._sink(name, tokens, request.salt, request.adapter)
        result = FetchResult(0)
        if (cached := await sink.cached()) < len(tokens):
            pair = await self._pairs.pair(Target(request.source, request.source_address))
            try:
                result = await pair.fetch(
                    self._ticket(name, request.source), tokens, request.salt, request.adapter, LEAST_PRIORITY, sink,
                    start=cached, cached_only=True,
                )  # fmt: skip
            finally:
                # Pages must come back even if who asked has gone.
                await asyncio.shield(self._close(sink))
            cached = await sink.cached()
        if cached < len(tokens):
            raise Unavailable(result.error or "there are no pages for it")
        log.info("%d tokens of a prefix came from %s", sink.moved_tokens, request.source_address)
        return pb.ReplicateReply(
            cached_tokens=cached, moved_tokens=sink.moved_tokens, bytes=result.bytes, seconds=result.seconds
        )

    async def _close(self, sink: ReplicaSink) -> None:
        await sink.close()
        self._ended()

    def _ticket(self, name: str, sender: str) -> Ticket:
        return Ticket(name, name, 0, sender, self._me.incarnation, self._me.layout.digest(), *self._deadlines)

    def leaks(self) -> list[str]:
        """What is on its way, one line each."""
        return [f"replica {name} of {len(tokens)} tokens is on its way" for name, tokens in self._running.items()]
