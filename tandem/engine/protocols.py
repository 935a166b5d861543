"""What the engine's scheduling side asks of its tensor side. `Runner` and `KvPool` fulfil it, and so do the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.engine.sequence import Batch, Sampled
from tandem.kv import KvLayout, Span

SpanBytes = memoryview | NDArray[np.uint8]
"""KV of one span in canonical order `[plane][layer][token][head][dim]`."""


class PoolLike(Protocol):
    """KV memory in pages; token p of a sequence lies at slot `pages[p // page_size] * page_size + p % page_size`."""

    @property
    def layout(self) -> KvLayout:
        """What one token's KV consists of."""

    @property
    def num_pages(self) -> int:
        """Pages in all."""

    @property
    def page_size(self) -> int:
        """Tokens in a page."""

    def gather(self, pages: Sequence[int], span: Span, out: Any) -> None:
        """Copies the KV of a span into `out`; raises ValueError on a wrong length."""

    def scatter(self, pages: Sequence[int], span: Span, data: Any) -> None:
        """The inverse of `gather`."""

    def copy_tokens(self, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of one page to another."""


class RunnerLike(Protocol):
    """Forward and sampling of one batch."""

    def run(self, batch: Batch) -> list[Sampled]:
        """Writes the KV of every computed position and returns one entry for each row, in order."""
