"""Paged attention against attention written out for one row and one head at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.attention.base import AttentionBatch, AttentionForm
from tandem.engine.attention.buckets import MAX_PADDING, cut_rows, split_rows
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kv_pool import KvPool
from tandem.kv import KvLayout, LayerGroup, Plane

CPU = torch.device("cpu")
DIM = 8


FORM = AttentionForm(scale=0.3)
ANYWHERE = 1 << 40
"""The number of a page that is not there: whoever reads it fails."""


def make_pool(kv_heads: int, page_size: int, num_pages: int, dtype: str = "float32", window: int | None = 5) -> KvPool:
    """Layers 0 and 2 with full attention, layer 1 with the window."""
    planes = (Plane("k", kv_heads, DIM, dtype), Plane("v", kv_heads, DIM, dtype))
    groups = (LayerGroup((0, 2)), LayerGroup((1,), window))
    return KvPool(KvLayout(planes, groups), num_pages, page_size, CPU)


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, form: AttentionForm
) -> torch.Tensor:
    """`[new, heads, dim]` queries of positions `start..` over `[length, kv_heads, dim]`, in float64."""
    group = query.shape[1] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for step in range(len(query)):
        end = start + step + 1
        first = 0 if form.window is None else max(0, end - form.window)
        for head in range(query.shape[1]):
            scores = keys[first:end, head // group].double() @ query[step, head].double() * form.scale
            if form.softcap is not None:
                scores = (scores / form.softcap).tanh() * form.softcap
            out[step, head] = scores.softmax(0) @ values[first:end, head // group].double()
    return out


def check(
    rows: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    page_size: int,
    dtype: str,
    tolerance: float,
    form: AttentionForm = FORM,
) -> None:
    """Rows are (start, count); KV before `start` was stored earlier, everything else in the pool is not finite."""
    lengths = [start + count for start, count in rows]
    total = sum(-(-length // page_size) for length in lengths) + 3
    pool = make_pool(kv_heads, page_size, total, dtype, form.window or 5)
    layer = 2 if form.window is None else 1
    free = random.Random(len(rows)).sample(range(total), total)
    pages = [np.array([free.pop() for _ in range(-(-length // page_size))]) for length in lengths]
    other = [np.flip(own) for own in pages]
    if form.window is not None:
        for row, (start, _) in enumerate(rows):
            pages[row][: max(0, start - form.window + 1) // page_size] = ANYWHERE
    generator = torch.Generator().manual_seed(1)
    kind = pool.plane("k", layer).dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    keys, values = [noise(n, kv_heads, DIM) for n in lengths], [noise(n, kv_heads, DIM) for n in lengths]
    query = noise(sum(count for _, count in rows), kv_heads * group, DIM)
    for plane, stored in (("k", keys), ("v", values)):
        tensor = pool.plane(plane, layer).fill_(torch.nan)
        for row, (start, _) in enumerate(rows):
            positions = np.arange(start)
            slots = pages[row][positions // page_size] * page_size + positions % page_size
            there = slots < len(tensor)
            tensor[torch.from_numpy(slots[there])] = stored[row][:start][torch.from_numpy(there)]
    starts, counts = np.array([start for start, _ in rows]), np.array([count for _, count in rows])
    grouped = [other, pages] if form.window is not None else [pages, other]
    plan = TorchPagedAttention(pool).plan(AttentionBatch(starts, counts, grouped))
    new = [torch.cat([part[start:] for part, (start, _) in zip(kv, rows, strict=True)]) for kv in (keys, values)]
    out = plan.run(layer, query, new[0], new[1], form)
    offsets = np.cumsum(counts) - counts
    expected = [
        naive(query[first : first + count], keys[row], values[row], start, form)
        for row, (first, (start, count)) in enumerate(zip(offsets, rows, strict=True))
    ]
    assert out.dtype == kind
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)
    assert not pool.plane("k", 0).any(), "another layer was written"


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.sampled_from((1, 1, 1, 2, 5, 33))), min_size=1, max_size=8),
    kv_heads=st.sampled_from((1, 2, 3)),
    group=st.sampled_from((1, 2, 7)),
    page_size=st.sampled_from((1, 4, 16, 64)),
)
def test_any_batch_is_attended_as_its_rows_are(
    rows: list[tuple[int, int]], kv_heads: int, group: int, page_size: int
) -> None:
    check(rows, kv_heads, group, page_size, "float32", 1e-5)


@settings(max_examples=80)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.sampled_from((1, 1, 1, 2, 5, 33, 150))), min_size=1, max_size=6),
    group=st.sampled_from((1, 2, 7)),
    page_size=st.sampled_from((1, 4, 16)),
    window=st.sampled_from((None, 1, 2, 7, 16, 40, 140)),
    softcap=st.sampled_from((None, 0.7)),
)
def test_windows_and_caps_are_those_of_each_row(
    rows: list[tuple[int, int]], group: int, page_size: int, window: int | None, softcap: float | None
) -> None:
    check(rows, 2, group, page_size, "float32", 1e-5, AttentionForm(0.3, window, softcap))


MIXES = ([(40, 1), (40, 1)], [(17, 1), (3, 1), (0, 9)], [(0, 20), (0, 23)], [(5, 12), (7, 11)])


@pytest.mark.parametrize("rows", MIXES)
def test_padded_rows_stay_apart(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "float32", 1e-5)


@pytest.mark.parametrize("rows", MIXES)
def test_bfloat16_is_as_exact_as_its_inputs(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "bfloat16", 2e-2)
    check(rows, 2, 4, 16, "bfloat16", 2e-2, AttentionForm(0.3, 6, 0.7))


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from((1, 1, 2, 64, 300))), min_size=1, max_size=40))
def test_rows_are_split_once_each_and_padding_is_bounded(rows: list[tuple[int, int]]) -> None:
    counts = np.array([count for _, count in rows])
    lengths = np.array([start + count for start, count in rows])
    groups = split_rows(counts, lengths)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(rows)))
    for group in groups:
        padded = len(group) * counts[group].max() * lengths[group].max()
        assert padded <= MAX_PADDING * (counts[group] * lengths[group]).sum()
        assert len(set((counts[group] == 1).tolist())) == 1


def test_decoding_rows_of_similar_length_are_one_batch() -> None:
    lengths = np.arange(500, 532)
    assert len(split_rows(np.ones_like(lengths), lengths)) == 1


def test_a_long_row_with_a_window_reads_each_token_twice_at_most() -> None:
    batch = AttentionBatch(np.array([0, 3000]), np.array([2000, 1]), [])
    pieces = cut_rows(batch, 128)
    assert pieces.counts.sum() == 2001
    assert pieces.lengths.sum() <= 2 * 2000 + 128
    assert cut_rows(batch, None).lengths.tolist() == [2000, 3001]


def test_layouts_and_batches_that_it_cannot_serve_are_refused() -> None:
    latent = KvLayout((Plane("latent", 1, DIM, "float32"),), (LayerGroup((0,)),))
    with pytest.raises(ValueError, match="planes k and v"):
        TorchPagedAttention(KvPool(latent, 1, 1, CPU))
    backend, one = TorchPagedAttention(make_pool(1, 1, 1)), np.array([1])
    pages = [np.array([0])]
    with pytest.raises(ValueError, match="pages of 1 layer groups; the pool has 2"):
        backend.plan(AttentionBatch(one - 1, one, [pages]))
    plan, new = backend.plan(AttentionBatch(one - 1, one, [pages, pages])), torch.zeros(1, 1, DIM)
    with pytest.raises(ValueError, match="layer 1 has a window of None; its group has 5"):
        plan.run(1, new, new, new, FORM)
