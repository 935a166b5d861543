"""Paged attention by the compiled kernels: nothing is gathered or padded, keys and values are read where they lie.

Serves every head size, grouped queries, windows and soft-capping, in bfloat16 and float32. What the kernels would take
on trust is checked here: a page number out of range would read or write foreign memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.attention.base import AttentionBatch, AttentionForm, IntArray
from tandem.engine.attention.page_runs import tree_words
from tandem.engine.kernels.native import SUFFIXES, NativeLibrary
from tandem.engine.kv_pool import KvPool

CHUNK_ROWS = 48
"""Queries, over the heads of a group, that a task of a chunk computes together."""


class _Plan(ctypes.Structure):
    """`Plan` in attention.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "counts", "tokens", "table", "offsets")),
        ("page_size", ctypes.c_int64),
        ("tasks", ctypes.c_int64),
        ("task_rows", ctypes.c_void_p),
        ("task_firsts", ctypes.c_void_p),
        ("tile", ctypes.c_int64),
        ("nodes", ctypes.c_void_p),
        ("lineage", ctypes.c_void_p),
    ]


class _Layer(ctypes.Structure):
    """`Layer` in attention.cpp."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class NativeAttention:
    """The backend, over the pool's planes `k` and `v`, in memory of this process."""

    trees = True

    def __init__(self, pool: KvPool, library: NativeLibrary) -> None:
        planes = {plane.name: plane for plane in pool.layout.planes}
        if set(planes) != {"k", "v"} or planes["k"].heads != planes["v"].heads or len({*_kinds(pool)}) != 1:
            raise ValueError("native attention serves layouts of planes k and v of one shape and dtype")
        self.pool = pool
        self.dtype = pool.plane("k", 0).dtype
        if self.dtype not in SUFFIXES or pool.device.type != "cpu":
            raise ValueError(f"native attention serves bfloat16 and float32 on CPUs; got {self.dtype}, {pool.device}")
        self.library, self.kernel = library, library.kernels("attend")[self.dtype]
        self.plans: dict[tuple[int, int], _Plan] = {}
        """By layer group and query heads for each KV head: where the kernel finds the plan of the step."""
        self.current: NativePlan | None = None
        self._threads = library.threads
        self._groups = {layer: at for at, group in enumerate(pool.layout.groups) for layer in group.layers}
        self._layers: dict[tuple[int, int, AttentionForm], _Layer] = {}

    def plan(self, batch: AttentionBatch) -> NativePlan:
        """See `AttentionBackend.plan`. Raises ValueError when pages are missing or out of range."""
        if len(batch.counts) != len(batch.starts) or int(batch.starts.min()) < 0 or int(batch.counts.min()) < 1:
            raise ValueError("a batch's rows must start at 0 or later and have at least one new token")
        windows = [group.window for group in self.pool.layout.groups]
        if len(batch.pages) != len(windows):
            raise ValueError(f"pages of {len(batch.pages)} layer groups; the layout has {len(windows)}")
        tables = [self._table(batch, *each) for each in zip(batch.pages, windows, self.pool.group_pages, strict=True)]
        self.current = NativePlan(self, batch, tables)
        return self.current

    def _table(
        self, batch: AttentionBatch, pages: Sequence[IntArray], window: int | None, count: int
    ) -> tuple[IntArray, IntArray]:
        """The visible page numbers of all rows, and where each row's page 0 is or would be among them."""
        size = self.pool.page_size
        firsts = [0] * len(pages) if window is None else (np.maximum(batch.starts - window + 1, 0) // size).tolist()
        ends = (-(-(batch.starts + batch.counts) // size)).tolist()
        parts, offsets, at = [], [], 0
        for row, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            part = pages[row][first:end]
            if len(part) != end - first:
                raise ValueError(f"row {row} has {len(pages[row])} pages; {end} are needed")
            parts.append(part)
            offsets.append(at - first)
            at += end - first
        table = np.concatenate(parts).astype(np.int64, copy=False)
        if int(table.min()) < 0 or int(table.max()) >= count:
            raise ValueError(f"pages are {table.min()}..{table.max()}; the pool has 0..{count - 1}")
        return table, np.array(offsets, dtype=np.int64)

    def group_of(self, layer: int) -> int:
        """The layer group whose pages a layer uses."""
        return self._groups[layer]

    def layer(self, layer: int, heads: int, form: AttentionForm) -> _Layer:
        """What the kernel must know of a layer. Raises ValueError when form and layout disagree."""
        known = self._layers.get((layer, heads, form))
        if known is None:
            keys, values = self.pool.plane("k", layer), self.pool.plane("v", layer)
            kv_heads, dim = keys.shape[1:]
            if heads % kv_heads:
                raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
            if form.window != self.pool.layout.groups[self._groups[layer]].window:
                raise ValueError(f"the window of layer {layer} is {form.window}; its group has another")
            known = self._layers[layer, heads, form] = _Layer(
                keys.data_ptr(), values.data_ptr(), heads, kv_heads, dim,
                form.window or 0, form.scale, form.softcap or 0.0, self._threads,
            )  # fmt: skip
        return known


class NativePlan:
    """See `AttentionPlan`."""

    def __init__(self, backend: NativeAttention, batch: AttentionBatch, tables: Sequence[tuple[IntArray, IntArray]]):
        self._backend = backend
        self._dtype = backend.dtype
        starts, counts = (np.ascontiguousarray(part, dtype=np.int64) for part in (batch.starts, batch.counts))
        ends = counts.cumsum()
        self._tokens = int(ends[-1])
        self._rows = (starts, counts, ends - counts)
        self._trees = tree_words(batch) if batch.trees else None
        self._alive: list[IntArray] = []
        """What the kernel's plan points to."""
        self._tables = tables
        self._filled: set[tuple[int, int]] = set()
        for key in backend.plans:
            self._fill(key)

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> torch.Tensor:
        """See `AttentionPlan.run`. Raises ValueError when the tensors do not fit the batch or the pool."""
        if self._backend.current is not self:
            raise ValueError("another step was planned since")
        tokens, heads, dim = query.shape
        about = self._backend.layer(layer, heads, form)
        shape = (tokens, about.kv_heads, dim)
        if tokens != self._tokens or dim != about.dim or key.shape != shape or value.shape != shape:
            raise ValueError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; expected "
                f"{self._tokens} tokens, {about.kv_heads} KV heads of {about.dim}"
            )
        if not query.dtype is key.dtype is value.dtype is self._dtype:
            raise ValueError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; KV is {self._dtype}")
        query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
        if not query_strides[2] == key_strides[2] == value_strides[2] == 1:
            raise ValueError("the last dimension of query, key and value must be dense")
        out = self._backend.library.empty((tokens, heads, dim), self._dtype)
        plan = self._fill((self._backend.group_of(layer), heads // about.kv_heads))
        self._backend.library.call(
            self._backend.kernel, (query, key, value), ctypes.addressof(plan), ctypes.addressof(about),
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            *query_strides[:2], *key_strides[:2], *value_strides[:2], long=True,
        )  # fmt: skip
        return out

    def _fill(self, key: tuple[int, int]) -> _Plan:
        """The plan's place for a layer group and heads for each KV head, filled for this batch."""
        plan = self._backend.plans.setdefault(key, _Plan())
        if key not in self._filled:
            self._filled.add(key)
            self._write(plan, key[0], max(1, CHUNK_ROWS // key[1]))
        return plan

    def _write(self, plan: _Plan, group: int, tile: int) -> None:
        """Tasks in order of rows; a chunk is cut into tiles of so many new tokens."""
        starts, counts, firsts = self._rows
        table, offsets = self._tables[group]
        if int(counts.max()) == 1:
            rows, task_firsts = np.arange(len(counts)), np.zeros(len(counts), dtype=np.int64)
        else:
            tasks = -(-counts // tile)
            rows = np.repeat(np.arange(len(counts)), tasks)
            task_firsts = (np.arange(len(rows)) - np.repeat(tasks.cumsum() - tasks, tasks)) * tile
        arrays = [starts, counts, firsts, table, offsets, rows, task_firsts]
        self._alive += [*arrays, *(self._trees or ())]
        where = [array.ctypes.data for array in arrays]
        plan.__init__(  # type: ignore[misc]
            len(counts),
            *where[:5],
            self._backend.pool.page_size,
            len(rows),
            *where[5:],
            tile,
            *((None, None) if self._trees is None else (array.ctypes.data for array in self._trees)),
        )


def _kinds(pool: KvPool) -> list[tuple[int, int, str]]:
    return [(plane.heads, plane.head_dim, plane.dtype) for plane in pool.layout.planes]
