"""How the rows of a batch are cut and put together for one attention span; index arithmetic only, no tensors.

A row with a window and many new tokens is cut into pieces, each of which reads its own window's tokens and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.engine.attention.base import AttentionBatch, IntArray

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

MAX_PADDING = 1.5
"""A bucket is split when padding would make it this many times larger than its rows are."""
SHORTEST_PIECE = 128
"""New tokens in a piece of a windowed row, unless the window is longer: shorter ones cost more calls than they save."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of new tokens, each attended as one; all arrays are `[pieces]`."""

    rows: IntArray
    """The batch's row that each belongs to."""
    starts: IntArray
    """Position of the first new token."""
    counts: IntArray
    """New tokens."""
    offsets: IntArray
    """Index of the first new token in the batch."""
    firsts: IntArray
    """The first position that any of its tokens sees."""
    window: int | None

    @property
    def lengths(self) -> IntArray:
        """Positions that its tokens see together."""
        return self.starts + self.counts - self.firsts

    def take(self, which: IntArray) -> Pieces:
        """Some of them."""
        return Pieces(
            self.rows[which],
            self.starts[which],
            self.counts[which],
            self.offsets[which],
            self.firsts[which],
            self.window,
        )

    def hidden(self) -> BoolArray | None:
        """`[pieces, most counts, most lengths]`: seen positions, from `firsts` on, that a query must not see.

        A query repeated as padding sees what the piece's last one does. None when nothing is hidden.
        """
        count, length = int(self.counts.max()), int(self.lengths.max())
        if count == 1 and (self.lengths == length).all():
            return None
        queries = (self.starts - self.firsts)[:, None] + np.arange(count)
        queries = np.minimum(queries, self.lengths[:, None] - 1)[:, :, None]
        seen = np.arange(length)
        late: BoolArray = seen > queries
        return late if self.window is None else late | (seen <= queries - self.window)

    def causal(self) -> bool:
        """Whether what `hidden` hides is the plain triangle: all rows stand at their first position."""
        count = int(self.counts.max())
        return count > 1 and bool((self.starts == self.firsts).all()) and count <= (self.window or count)


def tree_hidden(pieces: Pieces, lineage: IntArray) -> BoolArray:
    """`Pieces.hidden` of one piece, a whole row whose last tokens are a tree. lineage: see `AttentionBatch.trees`."""
    start, count, first = (int(part[0]) for part in (pieces.starts, pieces.counts, pieces.firsts))
    nodes, end = len(lineage), start + count
    base = end - nodes
    bits = lineage[:, None] >> np.arange(nodes) & 1
    positions = np.arange(first, end)
    positions[base - first :] = base + bits.sum(axis=1) - 1
    queries = positions[start - first :, None]
    late: BoolArray = np.arange(first, end) > np.arange(start, end)[:, None]
    late[count - nodes :, base - first :] = bits == 0
    if pieces.window is not None:
        late |= positions <= queries - pieces.window
    return late[None]


def cut_rows(batch: AttentionBatch, window: int | None) -> Pieces:
    """The batch's rows, whole for full attention."""
    offsets = np.cumsum(batch.counts) - batch.counts
    if window is None:
        rows = np.arange(len(batch.counts))
        return Pieces(rows, batch.starts, batch.counts, offsets, np.zeros_like(rows), None)
    size = max(window, SHORTEST_PIECE)
    per_row = -(-batch.counts // size)
    rows = np.repeat(np.arange(len(batch.counts)), per_row)
    before = (np.arange(len(rows)) - np.repeat(np.cumsum(per_row) - per_row, per_row)) * size
    starts = batch.starts[rows] + before
    counts = np.minimum(batch.counts[rows] - before, size)
    return Pieces(rows, starts, counts, offsets[rows] + before, np.maximum(starts - window + 1, 0), window)


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


def page_table(pages: Sequence[IntArray]) -> IntArray:
    """`[rows, most pages]`, padded with 0 behind a row's own pages; never read there."""
    table = np.zeros((len(pages), max(len(own) for own in pages)), dtype=np.int64)
    for row, own in enumerate(pages):
        table[row, : len(own)] = own
    return table
