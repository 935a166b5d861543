"""What the engine's scheduling side asks of its tensor side. `Runner` and `KvPool` fulfil it, and so do the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.engine.radix import Pages
from tandem.engine.sequence import Batch, Sampled
from tandem.kv import KvLayout, Span

SpanBytes = memoryview | NDArray[np.uint8]
"""KV of one span in canonical order `[plane][layer][token][head][dim]`, of each layer its group's share."""


class PoolLike(Protocol):
    """KV memory in pages, numbered in each layer group apart.

    Token p of a sequence lies, in group g, at slot `pages[g][p // page_size] * page_size + p % page_size`.
    """

    @property
    def layout(self) -> KvLayout:
        """What one token's KV consists of."""

    @property
    def group_pages(self) -> tuple[int, ...]:
        """Pages of each group."""

    @property
    def page_size(self) -> int:
        """Tokens in a page."""

    def gather(self, pages: Pages, span: Span, total: int, out: Any) -> None:
        """Copies what moves of a span in a hand-over of `[0, total)`; raises ValueError on a wrong length."""

    def scatter(self, pages: Pages, span: Span, total: int, data: Any) -> None:
        """The inverse of `gather`."""

    def move_tokens(self, pages: Pages, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies positions of a sequence to others of it, in all groups; the two may overlap."""

    def digest(self, group: int, page: int) -> int:
        """Of all bytes of a group's page, for finding changes; says nothing of who made them."""

    def copy_tokens(self, group: int, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of one page of a group to another."""


class RunnerLike(Protocol):
    """Forward and sampling of batches."""

    def launch(self, batch: Batch, after: Any = None) -> Any:
        """Tells the device to write the KV of every computed position and to sample; waits for nothing.

        after: the step in flight, of which rows with a future token take it. Returns this step, in flight. What a
        device is told to do happens in that order. At most two are in flight, and the first is collected first.
        """

    def collect(self, flight: Any) -> list[Sampled]:
        """Waits for a step in flight; one entry for each row of its batch, in order."""
