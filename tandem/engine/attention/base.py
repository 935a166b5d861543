"""What an attention backend is: planned once for a batch, run once for each layer (the shape of FlashInfer's API).

FlashInfer: Ye et al. 2025, arXiv:2501.01005.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    pages: Sequence[Sequence[IntArray]]
    """Per layer group of the pool's layout and row, the page numbers that cover positions `[0, starts[r] + counts[r])`.

    More do no harm. A page wholly outside the window of all new tokens may be any number; it is never read.
    """
    trees: Mapping[int, IntArray] = field(default_factory=dict)
    """By row whose last tokens are a tree: of each of these, which of them it sees, itself among them, as bits.

    Beside them it sees what stands before the tree. A token's KV lies where its row's order puts it, but its position
    is that of its depth, the first of the tree being where the tree begins. 63 tokens at most; all bits of a token are
    of tokens before it.
    """


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What one layer's attention computes beside the plain product."""

    scale: float
    """Multiplies the products of queries and keys."""
    window: int | None = None
    """Position p sees `(p - window, p]`; None is all of `[0, p]`. The same as that of the layer's group."""
    softcap: float | None = None
    """Scores s become `softcap * tanh(s / softcap)` after scaling and before masking (Gemma 2)."""


class AttentionPlan(Protocol):
    """A batch's plan; valid for one forward pass."""

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """Stores the new keys and values in the pool, then attends causally to everything stored for each row.

        query: `[tokens, heads, head_dim]`; key, value: `[tokens, kv_heads, head_dim]`, rotated where the model rotates.
        Returns `[tokens, heads, head_dim]` in the query's dtype; the softmax is computed in float32.
        """


class AttentionBackend(Protocol):
    """Makes plans. Owns whatever workspace it needs; the KV itself belongs to the pool."""

    trees: bool
    """Whether it serves batches with trees; else `plan` raises ValueError on one."""

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """Called once per step by the engine thread, before the forward pass."""
