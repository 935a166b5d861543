"""Where landed spans go: pages of one sequence, which then goes on from them, or leaves them to the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tandem.engine.engine import Engine
from tandem.engine.sequence import Seq, SeqState
from tandem.kv import HashRoot, Span
from tandem.types import SamplingParams
from tandem.worker.engine_thread import EngineThread

Reserve = Callable[[Seq], Awaitable[int | None]]
"""Pages for the whole prompt of a sequence; returns how many of its tokens are cached, None to give up."""


@dataclass(slots=True, eq=False)
class _Turn:
    """A sequence that waits for pages."""

    seq: Seq
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Reservations:
    """Gives pages to one waiting sequence after another: the oldest first, and no other while it waits.

    The oldest is whom the engine keeps pages for (`Scheduler.open_reserved`). It may come back, when its first sender
    was lost, after younger ones have begun to wait; whoever holds it up then waits for ever.
    """

    def __init__(self, engine: Engine, thread: EngineThread) -> None:
        self._engine = engine
        self._thread = thread
        self._turns: list[_Turn] = []

    def changed(self) -> None:
        """Pages may have become free."""
        if self._turns:
            self._oldest().changed.set()

    def _oldest(self) -> _Turn:
        return min(self._turns, key=lambda turn: turn.seq.order)

    async def reserve(self, seq: Seq) -> int:
        """Waits for pages for the whole prompt of `seq`; returns how many of its tokens are cached."""
        turn = _Turn(seq)
        self._turns.append(turn)
        try:
            while True:
                turn.changed.clear()
                if turn is self._oldest():
                    cached = await self._thread.call(self._engine.reserve, seq)
                    if cached is not None:
                        return cached
                await turn.changed.wait()
        finally:
            self._turns.remove(turn)
            self.changed()


class PageSink:
    """A `kvtransfer.SpanSink` for one sequence. After a failed hand-over the next sender goes on where it stopped."""

    def __init__(self, seq: Seq, engine: Engine, thread: EngineThread, reserve: Reserve) -> None:
        self.cached = 0
        """Prompt tokens that were in this worker's own cache."""
        self.landed = 0
        """Tokens from 0 on whose KV is in pages, or is not needed, without a gap."""
        self.moved_tokens = 0
        self.reserved = False
        self._seq = seq
        self._engine = engine
        self._thread = thread
        self._reserve = reserve
        self._islands: dict[int, int] = {}

    async def reserve(self) -> int | None:
        """Waits for pages; returns the first token whose KV is needed."""
        if not self.reserved:
            cached = await self._reserve(self._seq)
            if cached is None:
                return None
            self.cached = cached
            self.landed = max(self.cached, self._engine.layout.moved_from(len(self._seq.tokens) - 1))
            self.reserved = True
        self._islands.clear()
        return self.landed

    async def land(self, span: Span, data: NDArray[np.uint8]) -> None:
        """Puts a verified span into its pages; spans may come in any order."""
        await self._thread.call(self._engine.import_span, self._seq, span, data)
        self.moved_tokens += span.count
        self._islands[span.start] = span.end
        while self.landed in self._islands:
            self.landed = self._islands.pop(self.landed)


class CacheSink:
    """A `kvtransfer.ReplicaSink`: what lands is the prefix cache's, as if it had been computed here.

    It takes pages that are free, or of which the cache can do without, and waits for none: requests go first.
    """

    def __init__(self, seq_id: str, tokens: Sequence[int], root: bytes, engine: Engine, thread: EngineThread) -> None:
        """tokens: of the prefix. root: of its hash chain."""
        # One token more, which is never computed: hand-overs move the KV of all tokens but the last.
        self._seq = Seq(
            seq_id,
            tokens=[*tokens, tokens[-1]],
            prompt_len=len(tokens) + 1,
            sampling=SamplingParams(max_tokens=1),
            root=root,
            eos_ids=frozenset(),
            state=SeqState.WAITING_KV,
        )
        self._engine = engine
        self._thread = thread
        self._pages = PageSink(self._seq, engine, thread, self._take)

    async def _take(self, seq: Seq) -> int | None:
        return await self._thread.call(self._engine.reserve, seq)

    @property
    def moved_tokens(self) -> int:
        """Tokens whose KV has come."""
        return self._pages.moved_tokens

    async def cached(self) -> int:
        """Tokens of the prefix that are cached here now."""
        return await self._thread.call(self._engine.match_len, self._seq.root, self._seq.tokens[:-1])

    async def reserve(self) -> int | None:
        """Pages at once or not at all; returns the first token whose KV is needed."""
        return await self._pages.reserve()

    async def land(self, span: Span, data: NDArray[np.uint8]) -> None:
        """Puts a verified span into its pages."""
        await self._pages.land(span, data)

    async def close(self) -> None:
        """Leaves what has landed without a gap to the cache, and gives back the other pages. Once, at the end."""
        await self._thread.call(self._engine.leave, self._seq, self._pages.landed)


def cache_sinks(engine: Engine, thread: EngineThread, root: HashRoot) -> Callable[..., CacheSink]:
    """Makes the sink of a prefix: (id, tokens, salt, adapter). root: the worker's own."""

    def make(name: str, tokens: Sequence[int], salt: str, adapter: str) -> CacheSink:
        return CacheSink(name, tokens, replace(root, salt=salt, adapter=adapter).digest(), engine, thread)

    return make
