"""Paged attention against attention written out for one row and one head at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.attention.base import AttentionBatch, AttentionForm
from tandem.engine.attention.torch_paged import MAX_PADDING, TorchPagedAttention, split_rows
from tandem.engine.kv_pool import KvPool
from tandem.kv import KvLayout, LayerGroup, Plane

CPU = torch.device("cpu")
DIM = 8


def make_pool(kv_heads: int, page_size: int, num_pages: int, dtype: str = "float32") -> KvPool:
    planes = (Plane("k", kv_heads, DIM, dtype), Plane("v", kv_heads, DIM, dtype))
    return KvPool(KvLayout(planes, (LayerGroup((0, 1)),)), num_pages, page_size, CPU)


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """`[new, heads, dim]` queries of positions `start..` over `[length, kv_heads, dim]`, in float64."""
    group = query.shape[1] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for step in range(len(query)):
        for head in range(query.shape[1]):
            seen = keys[: start + step + 1, head // group].double()
            weights = (seen @ query[step, head].double() * scale).softmax(0)
            out[step, head] = weights @ values[: start + step + 1, head // group].double()
    return out


def check(rows: list[tuple[int, int]], kv_heads: int, group: int, page_size: int, dtype: str, tolerance: float) -> None:
    """Rows are (start, count); KV before `start` was stored earlier, everything else in the pool is not finite."""
    lengths = [start + count for start, count in rows]
    pool = make_pool(kv_heads, page_size, sum(-(-length // page_size) for length in lengths) + 3, dtype)
    free = random.Random(len(rows)).sample(range(pool.num_pages), pool.num_pages)
    pages = [np.array([free.pop() for _ in range(-(-length // page_size))]) for length in lengths]
    generator = torch.Generator().manual_seed(1)
    kind = pool.plane("k", 1).dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    keys, values = [noise(n, kv_heads, DIM) for n in lengths], [noise(n, kv_heads, DIM) for n in lengths]
    query = noise(sum(count for _, count in rows), kv_heads * group, DIM)
    for plane, stored in (("k", keys), ("v", values)):
        tensor = pool.plane(plane, 1).fill_(torch.nan)
        for row, (start, _) in enumerate(rows):
            positions = np.arange(start)
            slots = pages[row][positions // page_size] * page_size + positions % page_size
            tensor[torch.from_numpy(slots)] = stored[row][:start]
    starts, counts = np.array([start for start, _ in rows]), np.array([count for _, count in rows])
    plan = TorchPagedAttention(pool).plan(AttentionBatch(starts, counts, [pages]))
    new = [torch.cat([part[start:] for part, (start, _) in zip(kv, rows, strict=True)]) for kv in (keys, values)]
    out = plan.run(1, query, new[0], new[1], AttentionForm(scale=0.3))
    offsets = np.cumsum(counts) - counts
    expected = [
        naive(query[first : first + count], keys[row], values[row], start, 0.3)
        for row, (first, (start, count)) in enumerate(zip(offsets, rows, strict=True))
    ]
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


MIXES = ([(40, 1), (40, 1)], [(17, 1), (3, 1), (0, 9)], [(0, 20), (0, 23)], [(5, 12), (7, 11)])


@pytest.mark.parametrize("rows", MIXES)
def test_padded_rows_stay_apart(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "float32", 1e-5)


@pytest.mark.parametrize("rows", MIXES)
def test_bfloat16_is_as_exact_as_its_inputs(rows: list[tuple[int, int]]) -> None:
    check(rows, 2, 4, 16, "bfloat16", 2e-2)


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


def test_layouts_that_it_cannot_serve_are_refused() -> None:
    plane = Plane("latent", 1, DIM, "float32")
    for layout in (
        KvLayout((plane,), (LayerGroup((0,)),)),
        KvLayout((Plane("k", 1, DIM, "float32"), Plane("v", 1, DIM, "float32")), (LayerGroup((0,), window=4),)),
    ):
        with pytest.raises(ValueError, match="full attention only"):
            TorchPagedAttention(KvPool(layout, 1, 1, CPU))
