"""What an attention backend is: planned once for a batch, run once for each layer (the shape of FlashInfer's API).

FlashInfer: Ye et al. 2025, arXiv:2501.01005.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where a batch's new tokens stand. Row r computes positions `[starts[r], starts[r] + counts[r])` of its sequence.

    The tokens of all rows lie one after another, in row order.
    """

    starts: IntArray
    """`[rows]`"""
    counts: IntArray
    """`[rows]`, at least 1"""
    pages: Sequence[IntArray]
    """Per row, the page numbers that cover its positions `[0, starts[r] + counts[r])`; more do no harm."""


class AttentionPlan(Protocol):
    """A batch's plan; valid for one forward pass."""

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Stores the new keys and values in the pool, then attends causally to everything stored for each row.

        query: `[tokens, heads, head_dim]`; key, value: `[tokens, kv_heads, head_dim]`, rotated where the model rotates.
        Returns `[tokens, heads, head_dim]` in the query's dtype; the softmax is computed in float32.
        """


class AttentionBackend(Protocol):
    """Makes plans. Owns whatever workspace it needs; the KV itself belongs to the pool."""

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """Called once per step by the engine thread, before the forward pass."""
