"""Paged attention by FlashInfer (Ye et al. 2025, arXiv:2501.01005); written for its API of version 0.7.

Rows with one new token, which lead a batch, go through its decode wrapper, the others through its prefill wrapper. Both
read the pool's own memory, seen as `[pages, page_size, heads, head_dim]` ("NHD").

Not measured: checked against a stand-in that computes what FlashInfer documents; no GPU has run it yet.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tandem.device import on_device, upload
from tandem.engine.attention.base import AttentionBatch, AttentionForm, IntArray
from tandem.engine.attention.page_runs import token_slots, visible_pages
from tandem.engine.kv_pool import KvPool
from tandem.errors import ConfigError

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends; one is shared by all wrappers, which run one after another on one stream."""
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)


def load_flashinfer() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise ConfigError(f"attention is flashinfer, which cannot be imported: {error}", "attention") from error


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that one plan serves."""

    group: int
    form: AttentionForm
    heads: int
    """Query heads."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a batch as FlashInfer describes them; int32, on the host, where its planner reads them."""

    first: int
    """The first row's first token."""
    tokens: int
    indptr: torch.Tensor
    """`[rows + 1]` into `indices`."""
    indices: torch.Tensor
    """Page numbers, from the first that a row's window reaches."""
    last_page_len: torch.Tensor
    """`[rows]` tokens in each row's last page, 1 to the page size."""
    query_indptr: torch.Tensor
    """`[rows + 1]` into the tokens."""


class FlashInferAttention:
    """The backend: grouped queries, windows, soft caps; heads of 64, 128 or 256 in float16 or bfloat16."""

    trees = False

    def __init__(self, pool: KvPool, library: Any) -> None:
        """library: `load_flashinfer()`. Raises ConfigError on what it does not serve."""
        planes = {plane.name: plane for plane in pool.layout.planes}
        if set(planes) != {"k", "v"} or len({(p.heads, p.head_dim, p.dtype) for p in planes.values()}) != 1:
            raise ConfigError("attention is flashinfer; it serves planes k and v of one shape and dtype", "attention")
        self.dtype = pool.plane("k", 0).dtype
        if planes["k"].head_dim not in HEAD_DIMS or self.dtype not in DTYPES:
            raise ConfigError(
                f"attention is flashinfer; it serves heads of 64, 128 and 256 elements in float16 and bfloat16, and "
                f"this model has {planes['k'].head_dim} in {planes['k'].dtype}",
                "attention",
            )
        self.pool = pool
        self.kv_heads, self.dim = planes["k"].heads, planes["k"].head_dim
        self._library = library
        self._groups = {layer: at for at, group in enumerate(pool.layout.groups) for layer in group.layers}
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._decoders: dict[_Kind, Any] = {}
        self._prefillers: dict[_Kind, Any] = {}

    def plan(self, batch: AttentionBatch) -> FlashInferPlan:
        """See `AttentionBackend.plan`. Raises ValueError when pages are missing or out of range, and on a tree."""
        if batch.trees:
            raise ValueError(f"rows {', '.join(map(str, batch.trees))} have trees; these kernels attend to chains")
        groups = self.pool.layout.groups
        if len(batch.pages) != len(groups):
            raise ValueError(f"pages of {len(batch.pages)} layer groups; the pool has {len(groups)}")
        parts, slots = [], []
        for group, pages, count in zip(groups, batch.pages, self.pool.group_pages, strict=True):
            table, firsts = visible_pages(batch, pages, group.window, self.pool.page_size, count)
            parts.append(self._parts(batch, table, firsts))
            own = torch.from_numpy(token_slots(batch, table, firsts, self.pool.page_size))
            slots.append(upload(own, self.pool.device))
        return FlashInferPlan(self, parts, slots)

    def _parts(self, batch: AttentionBatch, table: IntArray, firsts: IntArray) -> tuple[_Rows, _Rows]:
        """The decoding rows in front, and the others.

        Leaving out the pages in front of a window is safe: masks count from a row's end, and positions are in the keys.
        """
        page, ends = self.pool.page_size, batch.starts + batch.counts
        indptr = np.concatenate(([0], firsts + -(-ends // page)))
        tokens = np.concatenate(([0], np.cumsum(batch.counts)))
        longer = np.flatnonzero(batch.counts > 1)
        cut = int(longer[0]) if len(longer) else len(batch.counts)

        def rows(first: int, end: int) -> _Rows:
            own = indptr[first : end + 1]
            return _Rows(
                first=int(tokens[first]),
                tokens=int(tokens[end] - tokens[first]),
                indptr=_int32(own - own[0]),
                indices=_int32(table[own[0] : own[-1]]),
                last_page_len=_int32((ends[first:end] - 1) % page + 1),
                query_indptr=_int32(tokens[first : end + 1] - tokens[first]),
            )

        return rows(0, cut), rows(cut, len(batch.counts))

    def group_of(self, layer: int, form: AttentionForm) -> int:
        """The layer's group. Raises ValueError when the form's window is not that of the group."""
        group = self._groups[layer]
        if form.window != self.pool.layout.groups[group].window:
            raise ValueError(f"layer {layer} has a window of {form.window}; its group has another")
        return group

    def planned_decode(self, kind: _Kind, rows: _Rows) -> Any:
        """The decode wrapper of these layers, planned for the rows."""
        wrapper = self._decoders.get(kind)
        if wrapper is None:
            # On tensor cores: the other kernels know few ratios of query to KV heads, and are slower at large ones.
            wrapper = self._decoders[kind] = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=True
            )
        wrapper.plan(
            rows.indptr, rows.indices, rows.last_page_len, kind.heads, self.kv_heads, self.dim, self.pool.page_size,
            **self._options(kind.form),
        )  # fmt: skip
        return wrapper

    def planned_prefill(self, kind: _Kind, rows: _Rows) -> Any:
        """The prefill wrapper of these layers, planned for the rows."""
        wrapper = self._prefillers.get(kind)
        if wrapper is None:
            wrapper = self._prefillers[kind] = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        wrapper.plan(
            rows.query_indptr, rows.indptr, rows.indices, rows.last_page_len, kind.heads, self.kv_heads, self.dim,
            self.pool.page_size, causal=True, **self._options(kind.form),
        )  # fmt: skip
        return wrapper

    def _options(self, form: AttentionForm) -> dict[str, Any]:
        """`window_left` counts the positions before a query's own, so that it is one less than a window."""
        return {
            "window_left": -1 if form.window is None else form.window - 1,
            "logits_soft_cap": form.softcap,
            "sm_scale": form.scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, each `[pages, page_size, kv_heads, head_dim]`: the pool's memory, not a copy."""
        keys, values = (self.pool.plane(name, layer) for name in ("k", "v"))
        shape = (-1, self.pool.page_size, self.kv_heads, self.dim)
        return keys.view(shape), values.view(shape)


class FlashInferPlan:
    """See `AttentionPlan`. Wrappers are planned when the first layer of their kind runs: only it tells its form."""

    def __init__(
        self, backend: FlashInferAttention, parts: list[tuple[_Rows, _Rows]], slots: list[torch.Tensor]
    ) -> None:
        self._backend = backend
        self._parts = parts
        self._slots = slots
        self._planned: dict[_Kind, tuple[Any, Any]] = {}

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """See `AttentionPlan.run`. Raises ValueError when the form's window is not that of the layer's group."""
        backend = self._backend
        group = backend.group_of(layer, form)
        decoding, chunks = self._parts[group]
        pool = backend.pool
        pool.plane("k", layer).index_copy_(0, self._slots[group], key)
        pool.plane("v", layer).index_copy_(0, self._slots[group], value)
        query, paged, out = query.contiguous(), backend.paged(layer), []
        with on_device(pool.device):
            decoder, prefiller = self._wrappers(_Kind(group, form, query.shape[1]))
            for wrapper, rows in ((decoder, decoding), (prefiller, chunks)):
                if wrapper is not None:
                    out.append(wrapper.run(query[rows.first : rows.first + rows.tokens], paged))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _wrappers(self, kind: _Kind) -> tuple[Any, Any]:
        """Those of the decoding rows and of the chunks, planned; None where there are no such rows."""
        found = self._planned.get(kind)
        if found is None:
            decoding, chunks = self._parts[kind.group]
            found = self._planned[kind] = (
                self._backend.planned_decode(kind, decoding) if decoding.tokens else None,
                self._backend.planned_prefill(kind, chunks) if chunks.tokens else None,
            )
        return found


def _int32(array: IntArray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32))
