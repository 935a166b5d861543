"""Where landed spans go: pages of one sequence, reserved in the order in which requests were admitted."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from tandem.engine.engine import Engine
from tandem.engine.sequence import Seq
from tandem.kv import Span
from tandem.worker.engine_thread import EngineThread


class Reservations:
    """Gives pages to one waiting sequence after another: the oldest first, and no other while it waits."""

    def __init__(self, engine: Engine, thread: EngineThread) -> None:
        self._engine = engine
        self._thread = thread
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Pages may have become free."""
        self._changed.set()

    async def reserve(self, seq: Seq) -> int:
        """Waits for pages for the whole prompt of `seq`; returns how many of its tokens are cached."""
        async with self._turn:
            while True:
                self._changed.clear()
                cached = await self._thread.call(self._engine.reserve, seq)
                if cached is not None:
                    return cached
                await self._changed.wait()


class PageSink:
    """A `kvtransfer.SpanSink` for one sequence. After a failed hand-over the next sender goes on where it stopped."""

    def __init__(self, seq: Seq, engine: Engine, thread: EngineThread, reservations: Reservations) -> None:
        self.cached = 0
        """Prompt tokens that were in this worker's own cache."""
        self.landed = 0
        """Tokens from 0 on whose KV is in pages, or is not needed, without a gap."""
        self.moved_tokens = 0
        self.reserved = False
        self._seq = seq
        self._engine = engine
        self._thread = thread
        self._reservations = reservations
        self._islands: dict[int, int] = {}

    async def reserve(self) -> int:
        """Waits for pages; returns the first token whose KV is needed."""
        if not self.reserved:
            self.cached = await self._reservations.reserve(self._seq)
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
