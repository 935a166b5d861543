"""Paged attention in plain torch, for CPUs.

Rows are split into buckets of similar shape, and each bucket is one padded, batched call of torch's flash attention.
For one token per row (decode) the query heads that share a KV head stand as its queries. Plain batched products would
do as well in float32; in bfloat16 each new length costs them a newly compiled kernel, ten times what attention takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tandem.engine.attention.base import AttentionBatch, AttentionForm, IntArray
from tandem.engine.kv_pool import KvPool

MAX_PADDING = 1.5
"""A bucket is split when padding would make it this many times larger than its rows are."""


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


class TorchPagedAttention:
    """The backend: full causal attention with grouped queries over the pool's planes `k` and `v`."""

    def __init__(self, pool: KvPool) -> None:
        planes = {plane.name: plane for plane in pool.layout.planes}
        if set(planes) != {"k", "v"} or any(group.window is not None for group in pool.layout.groups):
            raise ValueError("torch_paged serves layouts of planes k and v with full attention only")
        self.pool = pool
        self._workspace = pool.plane("k", 0).new_empty(0)

    def plan(self, batch: AttentionBatch) -> TorchPagedPlan:
        """See `AttentionBackend.plan`."""
        offsets = np.concatenate(([0], np.cumsum(batch.counts)))
        page = self.pool.page_size
        row = np.repeat(np.arange(len(batch.counts)), batch.counts)
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - batch.starts, batch.counts)
        table = _page_table(batch)
        slots = table[row, positions // page] * page + positions % page
        groups = split_rows(batch.counts, batch.starts + batch.counts)
        buckets = [self._bucket(batch, table, offsets, rows) for rows in groups]
        return TorchPagedPlan(self.pool, self._on_device(slots), buckets)

    def _bucket(self, batch: AttentionBatch, table: IntArray, offsets: IntArray, rows: IntArray) -> _Bucket:
        starts, counts = batch.starts[rows], batch.counts[rows]
        lengths = starts + counts
        count, length, page = int(counts.max()), int(lengths.max()), self.pool.page_size
        # Padding repeats the row's own last position: what lies elsewhere may be another sequence's, or not finite.
        positions = np.minimum(np.arange(length), lengths[:, None] - 1)
        slots = np.take_along_axis(table[rows], positions // page, axis=1) * page + positions % page
        steps = np.minimum(np.arange(count), counts[:, None] - 1)
        tokens = (offsets[rows][:, None] + steps).ravel()
        contiguous = bool((np.diff(tokens) == 1).all())
        real = np.flatnonzero((np.arange(count) < counts[:, None]).ravel())
        causal = count > 1 and not starts.any()
        return _Bucket(
            tokens=None if contiguous else self._on_device(tokens),
            first=int(tokens[0]),
            real=None if len(real) == len(tokens) else self._on_device(real),
            slots=self._on_device(slots.ravel()),
            gathered=self._room_for(slots.size),
            mask=None if causal else self._mask(starts, lengths, count, length),
            causal=causal,
            rows=len(rows),
            count=count,
            length=length,
        )

    def _mask(self, starts: IntArray, lengths: IntArray, count: int, length: int) -> torch.Tensor | None:
        """Hides keys after the query's own position; the last position of a row of its full length sees everything."""
        if count == 1 and (lengths == length).all():
            return None
        queries = starts[:, None] + np.arange(count)
        queries = np.minimum(queries, lengths[:, None] - 1)
        hidden = torch.from_numpy(np.arange(length) > queries[:, :, None])
        dtype = self.pool.plane("k", 0).dtype
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None].to(self.pool.device)

    def _room_for(self, slots: int) -> torch.Tensor:
        """`[2, slots, kv_heads, head_dim]` of the workspace, which all buckets and layers use one after another."""
        shape = (2, slots, *self.pool.plane("k", 0).shape[1:])
        if self._workspace.numel() < math.prod(shape):
            self._workspace = self._workspace.new_empty(math.prod(shape))
        return self._workspace[: math.prod(shape)].view(shape)

    def _on_device(self, indices: IntArray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.pool.device)


class TorchPagedPlan:
    """See `AttentionPlan`."""

    def __init__(self, pool: KvPool, slots: torch.Tensor, buckets: list[_Bucket]) -> None:
        self._pool = pool
        self._slots = slots
        self._buckets = buckets

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        scale = form.scale
        keys, values = self._pool.plane("k", layer), self._pool.plane("v", layer)
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)
        if len(self._buckets) == 1 and self._buckets[0].tokens is None and self._buckets[0].real is None:
            return self._attend(query, keys, values, self._buckets[0], scale)
        out = torch.empty_like(query)
        for bucket in self._buckets:
            end = bucket.first + bucket.rows * bucket.count
            part = query[bucket.first : end] if bucket.tokens is None else query.index_select(0, bucket.tokens)
            result = self._attend(part, keys, values, bucket, scale)
            if bucket.tokens is None:
                out[bucket.first : end] = result
            elif bucket.real is None:
                out.index_copy_(0, bucket.tokens, result)
            else:
                out.index_copy_(0, bucket.tokens[bucket.real], result[bucket.real])
        return out

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bucket: _Bucket, scale: float
    ) -> torch.Tensor:
        """A bucket's queries `[rows * count, heads, dim]` against gathered context; returns the same shape."""
        kv_heads, dim = keys.shape[1:]
        heads, gathered = query.shape[1], bucket.gathered
        torch.index_select(keys, 0, bucket.slots, out=gathered[0])
        torch.index_select(values, 0, bucket.slots, out=gathered[1])
        key, value = gathered.view(2, bucket.rows, bucket.length, kv_heads, dim).transpose(2, 3)
        if bucket.count == 1:
            q = query.view(bucket.rows, kv_heads, -1, dim)
            return scaled_dot_product_attention(q, key, value, attn_mask=bucket.mask, scale=scale).reshape(query.shape)
        q = query.view(bucket.rows, bucket.count, heads, dim).transpose(1, 2)
        out = scaled_dot_product_attention(
            q, key, value, attn_mask=bucket.mask, is_causal=bucket.causal, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2).reshape(query.shape)


def split_rows(counts: IntArray, lengths: IntArray) -> list[IntArray]:
    """Row numbers grouped so that padding each group to its largest count and length wastes little.

    Decode rows (one new token) are never mixed with chunks. Within each kind, rows in order of length are cut into
    groups where the padded size would exceed `MAX_PADDING` times the real one.
    """
    if len(counts) == 1:
        return [np.zeros(1, dtype=np.int64)]
    groups = []
    for kind in (np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)):
        ordered = kind[np.argsort(counts[kind] * lengths[kind], kind="stable")]
        while len(ordered):
            count, length = np.maximum.accumulate(counts[ordered]), np.maximum.accumulate(lengths[ordered])
            padded = count * length * np.arange(1, len(ordered) + 1)
            fits = padded <= MAX_PADDING * np.cumsum(counts[ordered] * lengths[ordered])
            size = int(np.flatnonzero(fits)[-1]) + 1
            groups.append(np.sort(ordered[:size]))
            ordered = ordered[size:]
    return groups


def _page_table(batch: AttentionBatch) -> IntArray:
    """`[rows, most pages]`, padded with 0 behind a row's own pages; never read there."""
    table = np.zeros((len(batch.pages[0]), max(len(pages) for pages in batch.pages[0])), dtype=np.int64)
    for row, pages in enumerate(batch.pages[0]):
        table[row, : len(pages)] = pages
    return table
