"""The prefill worker's KV source: the engine's, bounded, and announced to routers before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvtransfer.base import Buffer
from tandem.errors import Overloaded
from tandem.kv import Span, block_hashes
from tandem.types import TokenIds
from tandem.worker.kv_source import EngineKvSource
from tandem.worker.process import Parts


class PromisingSource:
    """A `kvtransfer.KvSource` that promises a prompt's blocks, so that the next request with this prefix comes here."""

    def __init__(self, source: EngineKvSource, parts: Parts, max_waiting: int, caches: bool) -> None:
        """caches: whether what is computed stays; without a cache nothing is ever stored, and no promise kept."""
        self._caches, self._source = caches, source
        self._publisher = parts.publisher
        self._metrics = parts.metrics
        self._root = parts.root
        self._max_waiting = max_waiting
        self._promises = parts.publisher.promises
        self._tickets: set[str] = set()

    async def open(
        self,
        ticket_id: str,
        tokens: TokenIds,
        salt: str,
        adapter: str,
        priority: int,
        on_progress: Callable[[int], None],
        tenant: str = "",
        cached_only: bool = False,
    ) -> int:
        """See `KvSource.open`. Raises Overloaded when too many tickets are open."""
        if len(self._tickets) >= self._max_waiting:
            raise Overloaded(f"{len(self._tickets)} prompts wait here; at most {self._max_waiting} are taken")
        if cached_only:  # for another worker's cache: nothing is computed, and no request is served
            self._tickets.add(ticket_id)
            return await self._source.open(ticket_id, tokens, salt, adapter, priority, on_progress, tenant, True)
        self._tickets.add(ticket_id)
        if self._caches:
            root = replace(self._root, salt=salt, adapter=adapter).digest()
            self._promises.make(ticket_id, tuple(block_hashes(root, tokens)))
        self._publisher.poke()
        cached = await self._source.open(ticket_id, tokens, salt, adapter, priority, on_progress, tenant)
        self._metrics.prompt_tokens.inc(len(tokens))
        self._metrics.prefix_hits.labels("prefill").inc(cached)
        return cached

    async def export(self, ticket_id: str, span: Span, out: Buffer) -> None:
        """See `KvSource.export`."""
        await self._source.export(ticket_id, span, out)

    def give_up(self, ticket_id: str) -> None:
        """See `KvSource.give_up`."""
        self._source.give_up(ticket_id)

    async def close(self, ticket_id: str) -> None:
        """See `KvSource.close`. Its promise is taken back; what was stored stays known."""
        if ticket_id not in self._tickets:  # refused before the engine heard of it
            return
        self._tickets.remove(ticket_id)
        await self._source.close(ticket_id)
        self._promises.end(ticket_id)
        self._publisher.poke()
