"""Paged attention by Triton kernels: keys and values are read where they lie, in any page size.

Chunks are cut into tiles of queries. Decoding rows are cut along their context instead, in parts of a fixed length: a
long sequence then does not wait for one processor, and what a row computes does not depend on the rows beside it.

Not measured: these kernels ran in Triton's interpreter and were compiled, but no GPU has run them yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tandem.device import on_device
from tandem.engine.attention.base import AttentionBatch, AttentionForm, IntArray
from tandem.engine.attention.page_runs import token_slots, visible_pages
from tandem.engine.attention.triton_plan import (
    GroupPlan,
    Tiles,
    chunk_items,
    decode_items,
    pack,
    tiles_for,
    tree_arrays,
)
from tandem.engine.kernels.gpu.attend import attend, combine, store
from tandem.engine.kv_pool import KvPool

PART_TOKENS = 256
"""Context that one program of a decoding row reads."""


class TritonPagedAttention:
    """The backend: grouped queries, windows, soft caps, every head size; float32, bfloat16, float16."""

    trees = True

    def __init__(self, pool: KvPool, part_tokens: int = PART_TOKENS) -> None:
        """Raises ValueError on layouts that it cannot serve."""
        planes = {plane.name: plane for plane in pool.layout.planes}
        if set(planes) != {"k", "v"} or len({(p.heads, p.head_dim, p.dtype) for p in planes.values()}) != 1:
            raise ValueError("triton attention serves layouts of planes k and v of one shape and dtype")
        self.pool = pool
        self.kv_heads, self.dim = planes["k"].heads, planes["k"].head_dim
        self.part_tokens = part_tokens
        self.groups = {layer: at for at, group in enumerate(pool.layout.groups) for layer in group.layers}

    def plan(self, batch: AttentionBatch) -> TritonPagedPlan:
        """See `AttentionBackend.plan`. Raises ValueError when pages are missing or out of range."""
        groups = self.pool.layout.groups
        if len(batch.pages) != len(groups):
            raise ValueError(f"pages of {len(batch.pages)} layer groups; the pool has {len(groups)}")
        tables = [
            visible_pages(batch, pages, group.window, self.pool.page_size, count)
            for group, pages, count in zip(groups, batch.pages, self.pool.group_pages, strict=True)
        ]
        return TritonPagedPlan(self, batch, tables)

    def tiles(self, heads: int) -> Tiles:
        """Block sizes for so many query heads. Raises ValueError when the KV heads cannot be shared among them."""
        if heads % self.kv_heads:
            raise ValueError(f"{heads} query heads cannot share {self.kv_heads} KV heads")
        return tiles_for(heads // self.kv_heads, self.dim, self.pool.plane("k", 0).element_size())


class TritonPagedPlan:
    """See `AttentionPlan`. What a group's layers need is put on the device when the first of them runs."""

    def __init__(
        self, backend: TritonPagedAttention, batch: AttentionBatch, tables: Sequence[tuple[IntArray, IntArray]]
    ) -> None:
        self.batch = batch
        self.tables = tables
        """Of each layer group, as `visible_pages` gives them."""
        self._backend = backend
        self._plans: dict[tuple[int, int], GroupPlan] = {}

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """See `AttentionPlan.run`. Raises ValueError when the form's window is not that of the layer's group."""
        backend, plan = self._backend, self.group_plan(layer, query.shape[1])
        if form.window != plan.window:
            raise ValueError(f"layer {layer} has a window of {form.window}; its group has {plan.window}")
        query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
        pool, shape = backend.pool, (len(plan.slots), backend.kv_heads, backend.dim)
        if key.shape != shape or value.shape != shape or query.shape != (shape[0], query.shape[1], shape[2]):
            raise ValueError(f"queries {tuple(query.shape)} and keys {tuple(key.shape)}; {shape} were planned")
        keys, values = pool.plane("k", layer), pool.plane("v", layer)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        with on_device(pool.device):
            block = 1 << (backend.kv_heads * backend.dim - 1).bit_length()
            store[(shape[0],)](
                key, value, keys, values, plan.slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
                HEADS=backend.kv_heads, DIM=backend.dim, BLOCK=block,
            )  # fmt: skip
            if plan.decoding:
                self._decode(plan, query, keys, values, out, form)
            if len(plan.chunks):
                self._attend(plan, plan.chunks, query, keys, values, (out, out, out), form)
        return out

    def group_plan(self, layer: int, heads: int) -> GroupPlan:
        """That of the layer's group, for so many query heads."""
        group = self._backend.groups[layer]
        plan = self._plans.get((group, heads))
        if plan is None:
            plan = self._plans[group, heads] = self._make_group_plan(group, heads)
        return plan

    def _make_group_plan(self, group: int, heads: int) -> GroupPlan:
        backend, batch, (table, firsts) = self._backend, self.batch, self.tables[group]
        tiles, window, page = backend.tiles(heads), backend.pool.layout.groups[group].window, backend.pool.page_size
        rows = np.stack((batch.starts, batch.counts, np.cumsum(batch.counts) - batch.counts, firsts), axis=1)
        order = np.argsort(batch.counts > 1, kind="stable")  # decoding rows first
        rows, trees = rows[order], tree_arrays(batch, order) if batch.trees else ()
        decoding = int((batch.counts == 1).sum())
        parts, first_parts = decode_items(rows[:decoding], window, backend.part_tokens)
        chunks = chunk_items(
            rows, decoding, window, heads // backend.kv_heads, tiles.chunk, trees[0] if trees else None
        )
        arrays = (token_slots(batch, table, firsts, page), rows, table, first_parts, parts, chunks, *trees)
        return GroupPlan(window, decoding, tiles, *pack(arrays, backend.pool.device))

    def _decode(
        self,
        plan: GroupPlan,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        form: AttentionForm,
    ) -> None:
        partial = torch.empty((len(plan.parts), *out.shape[1:]), dtype=torch.float32, device=out.device)
        sums, peaks = torch.empty((2, *partial.shape[:2]), dtype=torch.float32, device=out.device)
        targets = (partial, sums, peaks)
        self._attend(plan, plan.parts, query, keys, values, targets, form, partial=True)
        combine[(plan.decoding, query.shape[1])](
            partial, sums, peaks, out, plan.firsts, plan.rows, DIM=self._backend.dim, BLOCK_D=plan.tiles.dim
        )

    def _attend(
        self,
        plan: GroupPlan,
        items: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        form: AttentionForm,
        partial: bool = False,
    ) -> None:
        backend, tiles, trees = self._backend, plan.tiles, (plan.nodes, plan.places, plan.lineage)
        attend[(len(items), backend.kv_heads)](
            query, keys, values, *targets, items, plan.rows, plan.pages,
            *((plan.rows,) * 3 if partial or plan.nodes is None else trees), form.scale, form.softcap or 1.0,
            query.stride(0), query.stride(1), GROUP=query.shape[1] // backend.kv_heads, DIM=backend.dim,
            PAGE=backend.pool.page_size, WINDOW=plan.window or 0, CAPPED=form.softcap is not None, PARTIAL=partial,
            TREES=plan.nodes is not None and not partial,
            BLOCK_M=tiles.decode if partial else tiles.chunk, BLOCK_N=tiles.context, BLOCK_D=tiles.dim,
            num_warps=4, num_stages=2,
        )  # fmt: skip
