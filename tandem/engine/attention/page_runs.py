"""Which pages a batch's new tokens see, one row after another: how kernels find a row's context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.engine.attention.base import AttentionBatch, IntArray


def visible_pages(
    batch: AttentionBatch, pages: Sequence[IntArray], window: int | None, page_size: int, num_pages: int
) -> tuple[IntArray, IntArray]:
    """The page numbers that some new token of each row sees, one row after another, and where each row's page 0 is.

    `firsts[row] + position // page_size` is where a position's page stands, so that a first may be negative where a
    window leaves pages out. Raises ValueError when pages are missing or out of range: kernels would read and write
    foreign memory.
    """
    firsts = np.zeros_like(batch.starts)
    if window is not None:
        firsts = np.maximum(batch.starts - window + 1, 0) // page_size
    ends = -(-(batch.starts + batch.counts) // page_size)
    parts = [row[first:end] for row, first, end in zip(pages, firsts.tolist(), ends.tolist(), strict=True)]
    sizes = np.array([len(part) for part in parts])
    if (sizes != ends - firsts).any():
        row = int(np.flatnonzero(sizes != ends - firsts)[0])
        raise ValueError(f"row {row} has {len(pages[row])} pages; {ends[row]} are needed")
    table = np.concatenate(parts).astype(np.int64, copy=False)
    if int(table.min()) < 0 or int(table.max()) >= num_pages:
        raise ValueError(f"pages are {table.min()}..{table.max()}; the pool has 0..{num_pages - 1}")
    return table, np.cumsum(sizes) - sizes - firsts


def token_slots(batch: AttentionBatch, table: IntArray, firsts: IntArray, page_size: int) -> IntArray:
    """`[tokens]`: where the new tokens' keys and values go. table, firsts: as `visible_pages` gives them."""
    row = np.repeat(np.arange(len(batch.counts)), batch.counts)
    positions = np.arange(len(row)) - np.repeat(np.cumsum(batch.counts) - batch.counts - batch.starts, batch.counts)
    return np.asarray(table[firsts[row] + positions // page_size] * page_size + positions % page_size)


def tree_words(batch: AttentionBatch) -> tuple[IntArray, IntArray]:
    """`[rows]` nodes of each row's tree, and `[tokens]` what each of them sees of its tree, as bits; 0 for others.

    Raises ValueError where a node would see what is not there.
    """
    ends = batch.counts.cumsum()
    nodes, lineage = np.zeros(len(batch.counts), dtype=np.int64), np.zeros(int(ends[-1]), dtype=np.int64)
    for row, words in batch.trees.items():
        places = np.arange(len(words))
        if not 1 <= len(words) <= min(63, int(batch.counts[row]) - 1) or ((words >> places) != 1).any():
            raise ValueError(f"row {row} has a tree of {len(words)} tokens that see others than themselves and earlier")
        nodes[row] = len(words)
        lineage[ends[row] - len(words) : ends[row]] = words
    return nodes, lineage
