"""What Triton's attention kernels are told of a batch: tiles, items, and the arrays that carry them to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.device import upload
from tandem.engine.attention.base import AttentionBatch, IntArray
from tandem.engine.attention.page_runs import tree_words

LEAST_LANES = 16
"""The smallest tile a tensor core takes."""
ALIGNED = 4
"""Integers in 16 bytes. Triton compiles a kernel anew for a pointer that is not aligned so."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block sizes of the kernels, powers of two."""

    decode: int
    """Query heads of a group, padded."""
    chunk: int
    """Pairs of a new token and a query head of a group."""
    context: int
    """Positions whose keys and values are held at once."""
    dim: int
    """The size of a head, padded."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The plan of the layers with one attention span; int32 on the device. See `attend` for rows, items and firsts."""

    window: int | None
    decoding: int
    """Rows that are."""
    tiles: Tiles
    slots: torch.Tensor
    rows: torch.Tensor
    pages: torch.Tensor
    firsts: torch.Tensor
    parts: torch.Tensor
    """Items of decoding rows."""
    chunks: torch.Tensor
    """Items of the others."""
    nodes: torch.Tensor | None = None
    places: torch.Tensor | None = None
    lineage: torch.Tensor | None = None
    """Of trees, where there are any; see `attend`."""


def tiles_for(group: int, dim: int, element_size: int) -> Tiles:
    """Block sizes that keep a tile within the 99 KiB of shared memory that every supported GPU has.

    group: query heads for each KV head. The choice has not been measured.
    """
    padded = max(LEAST_LANES, 1 << (dim - 1).bit_length())
    size = padded * element_size
    lanes = max(LEAST_LANES, 1 << (group - 1).bit_length())
    chunk, context = (64, 64) if size <= 256 else (32, 32) if size <= 512 else (32, 16)
    return Tiles(decode=lanes, chunk=chunk, context=context, dim=padded)


def decode_items(rows: IntArray, window: int | None, part_tokens: int) -> tuple[IntArray, IntArray]:
    """Parts of the decoding rows' contexts `[parts, 4]` as `attend` takes them, and `[rows + 1]` each row's first part.

    rows: `[rows, 4]` as `attend` takes them. Parts begin at multiples of `part_tokens`, whatever the window.
    """
    ends = rows[:, 0] + 1
    begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    first = begins // part_tokens
    sizes = -(-ends // part_tokens) - first
    firsts = np.concatenate(([0], np.cumsum(sizes)))
    row = np.repeat(np.arange(len(rows)), sizes)
    at = (np.arange(len(row)) - firsts[row] + first[row]) * part_tokens
    begin, end = np.maximum(at, begins[row]), np.minimum(at + part_tokens, ends[row])
    return np.stack((row, np.zeros_like(row), begin, end), axis=1), firsts


def chunk_items(
    rows: IntArray, decoding: int, window: int | None, group: int, lanes: int, nodes: IntArray | None = None
) -> IntArray:
    """Tiles of the chunks, `[tiles, 4]` as `attend` takes them.

    rows: `[rows, 4]`, of which the first `decoding` are no chunks. lanes: those of a tile. nodes: `[rows]` of trees.
    """
    starts, totals = rows[decoding:, 0], rows[decoding:, 1] * group
    sizes = -(-totals // lanes)
    row = np.repeat(np.arange(len(totals)), sizes)
    lane = (np.arange(len(row)) - (np.cumsum(sizes) - sizes)[row]) * lanes
    first = starts[row] + lane // group
    last = starts[row] + (np.minimum(lane + lanes, totals[row]) - 1) // group
    if nodes is not None:  # a node's position is at most that of its slot
        first = np.where(nodes[row + decoding] > 0, starts[row], first)
    begin = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0)
    return np.stack((row + decoding, lane, begin, last + 1), axis=1)


def tree_arrays(batch: AttentionBatch, order: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Nodes, places and lineage as `attend` takes them. order: of the rows. Raises ValueError as `tree_words` does."""
    nodes, lineage = tree_words(batch)
    ends = batch.counts.cumsum()
    places = np.arange(len(lineage)) - np.repeat(ends - batch.counts - batch.starts, batch.counts)
    for row, count in zip(*(part.tolist() for part in (nodes.nonzero()[0], nodes[nodes > 0])), strict=True):
        depths = [word.bit_count() for word in lineage[ends[row] - count : ends[row]].tolist()]
        places[ends[row] - count : ends[row]] = batch.starts[row] + batch.counts[row] - count - 1 + np.array(depths)
    return nodes[order], places, lineage.view(np.int32).astype(np.int64)


def pack(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int32 tensors on the device, by one copy; each begins at a multiple of 16 bytes."""
    sizes = [-(-array.size // ALIGNED) * ALIGNED for array in arrays]
    flat = np.zeros(sum(sizes), dtype=np.int32)
    views, at = [], 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[at : at + array.size] = array.ravel()
        views.append((at, array))
        at += size
    whole = upload(torch.from_numpy(flat), device)
    return [whole[at : at + array.size].view(array.shape) for at, array in views]
