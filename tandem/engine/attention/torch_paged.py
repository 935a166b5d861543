"""Paged attention in plain torch, for CPUs.

Rows are split into buckets of similar shape, and each bucket is one padded, batched call of torch's flash attention.
For one token per row (decode) the query heads that share a KV head stand as its queries. Plain batched products would
do as well in float32; in bfloat16 each new length costs them a newly compiled kernel, ten times what attention takes.
Capped scores, which flash attention does not have, take plain products in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tandem.device import upload
from tandem.engine.attention.base import AttentionBatch, AttentionForm, IntArray
from tandem.engine.attention.buckets import BoolArray, Pieces, cut_rows, page_table, split_rows, tree_hidden
from tandem.engine.kv_pool import KvPool

CAPPED_QUERIES = 128
"""Queries of a row whose capped scores are held at once."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows that are computed together, padded to `count` new tokens and `length` tokens of context."""

    tokens: torch.Tensor | None
    """`[rows * count]` indices into the batch's tokens; None when they are `[first, first + rows * count)` in order."""
    first: int
    real: torch.Tensor | None
    """`[real tokens]` indices into `rows * count` that are not padding; None when all are real."""
    slots: torch.Tensor
    """`[rows * length]` slots of the rows' context."""
    gathered: torch.Tensor
    """`[2, rows * length, kv_heads, head_dim]`: where each layer in turn finds its keys and values together."""
    mask: torch.Tensor | None
    """Additive `[rows, 1, count, length]`; None when nothing needs masking, or `causal` masks it."""
    causal: bool
    rows: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class _GroupPlan:
    """The plan of the layers with one attention span."""

    window: int | None
    slots: torch.Tensor
    """`[tokens]`: where the new keys and values go."""
    buckets: list[_Bucket]


class TorchPagedAttention:
    """The backend: causal attention, full or windowed, with grouped queries over the pool's planes `k` and `v`."""

    trees = True

    def __init__(self, pool: KvPool) -> None:
        if {plane.name for plane in pool.layout.planes} != {"k", "v"}:
            raise ValueError("torch_paged serves layouts of planes k and v")
        self.pool = pool
        self._workspace = pool.plane("k", 0).new_empty(0)

    def plan(self, batch: AttentionBatch) -> TorchPagedPlan:
        """See `AttentionBackend.plan`."""
        groups = self.pool.layout.groups
        if len(batch.pages) != len(groups):
            raise ValueError(f"pages of {len(batch.pages)} layer groups; the pool has {len(groups)}")
        offsets = np.cumsum(batch.counts) - batch.counts
        row = np.repeat(np.arange(len(batch.counts)), batch.counts)
        positions = np.arange(len(row)) - np.repeat(offsets - batch.starts, batch.counts)
        page, plans = self.pool.page_size, {}
        for group, pages in zip(groups, batch.pages, strict=True):
            table = page_table(pages)
            slots = table[row, positions // page] * page + positions % page
            pieces = cut_rows(batch, group.window)
            plain = np.flatnonzero(~np.isin(pieces.rows, list(batch.trees)))
            parts = split_rows(pieces.counts[plain], pieces.lengths[plain]) if len(plain) else []
            buckets = [self._bucket(pieces.take(plain[which]), table) for which in parts]
            for tree, lineage in batch.trees.items():
                own = pieces.take(np.flatnonzero(pieces.rows == tree))
                buckets.append(self._bucket(_whole(own, lineage), table, lineage))
            plans.update(dict.fromkeys(group.layers, _GroupPlan(group.window, self._on_device(slots), buckets)))
        return TorchPagedPlan(self.pool, plans)

    def _bucket(self, pieces: Pieces, table: IntArray, lineage: IntArray | None = None) -> _Bucket:
        """lineage: of the one piece, a row with a tree."""
        counts, lengths = pieces.counts, pieces.lengths
        count, length, page = int(counts.max()), int(lengths.max()), self.pool.page_size
        # Padding repeats the row's own last position: what lies elsewhere may be another sequence's, or not finite.
        positions = pieces.firsts[:, None] + np.minimum(np.arange(length), lengths[:, None] - 1)
        slots = np.take_along_axis(table[pieces.rows], positions // page, axis=1) * page + positions % page
        steps = np.minimum(np.arange(count), counts[:, None] - 1)
        tokens = (pieces.offsets[:, None] + steps).ravel()
        contiguous = bool((np.diff(tokens) == 1).all())
        real = np.flatnonzero((np.arange(count) < counts[:, None]).ravel())
        causal = lineage is None and pieces.causal()
        return _Bucket(
            tokens=None if contiguous else self._on_device(tokens),
            first=int(tokens[0]),
            real=None if len(real) == len(tokens) else self._on_device(real),
            slots=self._on_device(slots.ravel()),
            gathered=self._room_for(slots.size),
            mask=None if causal else self._mask(pieces.hidden() if lineage is None else tree_hidden(pieces, lineage)),
            causal=causal,
            rows=len(counts),
            count=count,
            length=length,
        )

    def _mask(self, hidden: BoolArray | None) -> torch.Tensor | None:
        """See `_Bucket.mask`."""
        if hidden is None:
            return None
        mask = torch.zeros(hidden.shape, dtype=self.pool.plane("k", 0).dtype)
        return upload(mask.masked_fill_(torch.from_numpy(hidden), -torch.inf)[:, None], self.pool.device)

    def _room_for(self, slots: int) -> torch.Tensor:
        """`[2, slots, kv_heads, head_dim]` of the workspace, which all buckets and layers use one after another."""
        shape = (2, slots, *self.pool.plane("k", 0).shape[1:])
        if self._workspace.numel() < math.prod(shape):
            self._workspace = self._workspace.new_empty(math.prod(shape))
        return self._workspace[: math.prod(shape)].view(shape)

    def _on_device(self, indices: IntArray) -> torch.Tensor:
        return upload(torch.from_numpy(indices), self.pool.device)


def _whole(piece: Pieces, lineage: IntArray) -> Pieces:
    """The piece of a row with a tree, if it is one."""
    if len(piece.rows) != 1 or len(lineage) > int(piece.counts[0]):
        raise ValueError(f"a tree of {len(lineage)} tokens must be the end of one row that is computed as a whole")
    return piece


class TorchPagedPlan:
    """See `AttentionPlan`."""

    def __init__(self, pool: KvPool, plans: dict[int, _GroupPlan]) -> None:
        self._pool = pool
        self._plans = plans

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """See `AttentionPlan.run`. Raises ValueError when the form's window is not that of the layer's group."""
        plan = self._plans[layer]
        if form.window != plan.window:
            raise ValueError(f"layer {layer} has a window of {form.window}; its group has {plan.window}")
        keys, values, buckets = self._pool.plane("k", layer), self._pool.plane("v", layer), plan.buckets
        keys.index_copy_(0, plan.slots, key)
        values.index_copy_(0, plan.slots, value)
        if len(buckets) == 1 and buckets[0].tokens is None and buckets[0].real is None:
            return self._attend(query, keys, values, buckets[0], form)
        out = torch.empty_like(query)
        for bucket in buckets:
            end = bucket.first + bucket.rows * bucket.count
            part = query[bucket.first : end] if bucket.tokens is None else query.index_select(0, bucket.tokens)
            result = self._attend(part, keys, values, bucket, form)
            if bucket.tokens is None:
                out[bucket.first : end] = result
            elif bucket.real is None:
                out.index_copy_(0, bucket.tokens, result)
            else:
                out.index_copy_(0, bucket.tokens[bucket.real], result[bucket.real])
        return out

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bucket: _Bucket, form: AttentionForm
    ) -> torch.Tensor:
        """A bucket's queries `[rows * count, heads, dim]` against gathered context; returns the same shape."""
        kv_heads, dim = keys.shape[1:]
        heads, gathered = query.shape[1], bucket.gathered
        torch.index_select(keys, 0, bucket.slots, out=gathered[0])
        torch.index_select(values, 0, bucket.slots, out=gathered[1])
        key, value = gathered.view(2, bucket.rows, bucket.length, kv_heads, dim).transpose(2, 3)
        if form.softcap is not None:
            q = query.view(bucket.rows, bucket.count, heads, dim)
            return _capped(q, key, value, bucket, form.scale, form.softcap).reshape(query.shape)
        if bucket.count == 1:
            q = query.view(bucket.rows, kv_heads, -1, dim)
            mask, scale = bucket.mask, form.scale
            return scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale).reshape(query.shape)
        q = query.view(bucket.rows, bucket.count, heads, dim).transpose(1, 2)
        out = scaled_dot_product_attention(
            q,
            key,
            value,
            attn_mask=bucket.mask,
            is_causal=bucket.causal,
            scale=form.scale,
            enable_gqa=heads != kv_heads,
        )
        return out.transpose(1, 2).reshape(query.shape)


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bucket: _Bucket, scale: float, cap: float
) -> torch.Tensor:
    """`[rows, count, heads, dim]` queries over `[rows, kv_heads, length, dim]`; all in float32 but the result."""
    rows, count, _, dim = query.shape
    grouped = query.float().view(rows, count, key.shape[1], -1, dim).permute(0, 2, 3, 1, 4)
    key, value = key.float().transpose(2, 3)[:, :, None], value.float()[:, :, None]
    mask = bucket.mask
    if bucket.causal:
        mask = torch.full((count, bucket.length), -torch.inf, device=query.device).triu_(1).expand(1, 1, -1, -1)
    parts = []
    for first in range(0, count, CAPPED_QUERIES):
        scores = torch.matmul(grouped[:, :, :, first : first + CAPPED_QUERIES], key)
        scores.mul_(scale / cap).tanh_().mul_(cap)
        if mask is not None:
            scores += mask[:, :, None, first : first + CAPPED_QUERIES]
        parts.append(torch.matmul(scores.softmax(-1), value))
    out = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
    return out.permute(0, 3, 1, 2, 4).to(query.dtype)
