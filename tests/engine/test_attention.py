"""Paged attention against attention written out for one row and one head at a time."""

from __future__ import annotations

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
from tandem.testing.attention import AttentionCase, attend, written_out

CPU = torch.device("cpu")
DIM = 8


FORM = AttentionForm(scale=0.3)


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
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Rows are (start, count)."""
    result = attend(
        AttentionCase(tuple(rows), kv_heads, group, DIM, page_size, dtype, window, softcap), TorchPagedAttention
    )
    assert str(result.found.dtype) == f"torch.{dtype}"
    torch.testing.assert_close(result.found.double(), result.expected, atol=tolerance, rtol=tolerance)


@given(
    start=st.integers(0, 20),
    count=st.integers(1, 6),
    kv_heads=st.sampled_from((1, 2)),
    group=st.sampled_from((1, 3)),
    window=st.sampled_from((None, 1, 4, 30)),
    softcap=st.sampled_from((None, 0.7)),
)
def test_what_is_exact_is_so_for_each_token_and_head_alone(
    start: int, count: int, kv_heads: int, group: int, window: int | None, softcap: float | None
) -> None:
    """What all backends are compared with, against one that has no masks."""
    generator, form = torch.Generator().manual_seed(start), AttentionForm(0.3, window, softcap)
    query = torch.randn(count, kv_heads * group, DIM, generator=generator)
    keys, values = torch.randn(2, start + count, kv_heads, DIM, generator=generator)
    expected = naive(query, keys, values, start, form)
    torch.testing.assert_close(written_out(query, keys, values, start, form), expected)


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
    check(rows, 2, group, page_size, "float32", 1e-5, window, softcap)


MIXES = ([(40, 1), (40, 1)], [(17, 1), (3, 1), (0, 9)], [(0, 20), (0, 23)], [(5, 12), (7, 11)])


@pytest.mark.parametrize("rows", MIXES)
def test_padded_rows_stay_apart(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "float32", 1e-5)


@pytest.mark.parametrize("rows", MIXES)
def test_bfloat16_is_as_exact_as_its_inputs(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "bfloat16", 2e-2)
    check(rows, 2, 4, 16, "bfloat16", 2e-2, window=6, softcap=0.7)


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
