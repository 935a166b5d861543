"""Compiled attention against attention written out in float64: shapes, pages, windows, caps, mixed batches, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import cache_folder
from tandem.engine.attention.base import AttentionBatch, AttentionForm
from tandem.engine.attention.native import CHUNK_ROWS, NativeAttention
from tandem.engine.kernels.build import build_library, find_compiler
from tandem.engine.kernels.native import NativeLibrary
from tandem.engine.kv_pool import KvPool
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.attention import AttentionCase, attend

CPU = torch.device("cpu")
COMPILER = find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def backend(pool: KvPool, threads: int = 1) -> NativeAttention:
    return NativeAttention(pool, NativeLibrary(build_library(COMPILER, cache_folder()), threads))


def check(case: AttentionCase, threads: int = 1) -> None:
    result = attend(case, lambda pool: backend(pool, threads))
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(result.found.double(), result.expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=80)
@given(
    case=st.builds(
        AttentionCase,
        rows=st.lists(
            st.tuples(st.integers(0, 150), st.sampled_from((1, 1, 1, 2, 5, 33, 70))), min_size=1, max_size=6
        ).map(tuple),
        kv_heads=st.sampled_from((1, 2, 3)),
        group=st.sampled_from((1, 2, 3, 4, 7, 8)),
        dim=st.sampled_from((8, 16, 24, 32, 64, 80, 96, 128)),
        page_size=st.sampled_from((1, 4, 16, 64)),
        dtype=st.sampled_from(("float32", "bfloat16")),
        window=st.sampled_from((None, None, 1, 7, 64, 100)),
        softcap=st.sampled_from((None, None, 2.0, 30.0)),
    ),
    threads=st.sampled_from((1, 3)),
)
def test_any_batch_is_attended_as_it_is_written_out(case: AttentionCase, threads: int) -> None:
    check(case, threads)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [16, 20, 33, 64, 80, 96, 112, 128, 192, 256])
def test_every_head_size(dim: int, dtype: str) -> None:
    check(AttentionCase(((65, 1), (0, 50), (33, 17)), dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_histories_and_large_chunks(dtype: str) -> None:
    check(AttentionCase(((1500, 1), (700, 1), (300, 260)), group=7, dim=64, dtype=dtype))
    check(AttentionCase(((1500, 1), (300, 260)), group=1, dim=64, dtype=dtype, window=200, page_size=1))


def test_chunks_that_are_tiles_exactly() -> None:
    check(AttentionCase(((0, CHUNK_ROWS), (64, CHUNK_ROWS * 2), (63, 1)), group=1))


def test_a_row_does_not_depend_on_its_batch() -> None:
    planes = (Plane("k", 2, 32, "bfloat16"), Plane("v", 2, 32, "bfloat16"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,)),)), 8, 16, CPU)
    for name in ("k", "v"):
        pool.plane(name, 0).normal_(generator=torch.Generator().manual_seed(3))
    query, key, value = (torch.randn(2, heads, 32).bfloat16() for heads in (4, 2, 2))
    pages, form = [np.array([4, 2]), np.array([1, 5, 0])], AttentionForm(0.2)
    both = backend(pool).plan(AttentionBatch(np.array([20, 40]), np.array([1, 1]), [pages]))
    alone = backend(pool).plan(AttentionBatch(np.array([40]), np.array([1]), [pages[1:]]))
    together = both.run(0, query, key, value, form)
    assert torch.equal(together[1:], alone.run(0, query[1:], key[1:], value[1:], form))


def plan_of(pages: list[int], start: int = 20, count: int = 1) -> None:
    planes = (Plane("k", 2, 32, "float32"), Plane("v", 2, 32, "float32"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,)),)), 8, 16, CPU)
    plan = backend(pool).plan(AttentionBatch(np.array([start]), np.array([count]), [[np.array(pages)]]))
    plan.run(0, torch.zeros(1, 4, 32), torch.zeros(1, 2, 32), torch.zeros(1, 2, 32), AttentionForm(1.0))


@pytest.mark.parametrize(
    ("pages", "start", "message"),
    [
        ([1, 8], 20, "the pool has 0..7"),
        ([-1, 2], 20, "the pool has 0..7"),
        ([3], 20, "2 are needed"),
        ([3], -1, "must start at 0 or later"),
    ],
)
def test_pages_that_would_be_foreign_memory_are_refused(pages: list[int], start: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(pages, start)
    plan_of([3, 7])


def test_tensors_that_do_not_fit_are_refused() -> None:
    planes = (Plane("k", 2, 32, "float32"), Plane("v", 2, 32, "float32"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,)),)), 8, 16, CPU)
    plan = backend(pool).plan(AttentionBatch(np.array([3]), np.array([2]), [[np.array([5])]]))
    form, query, key = AttentionForm(1.0), torch.zeros(2, 4, 32), torch.zeros(2, 2, 32)
    plan.run(0, query, key, key, form)
    for bad in (
        (query[:1], key, key),
        (query, key[:1], key),
        (query, key, key[:, :1]),
        (query[..., :16], key[..., :16], key[..., :16]),
        (query[:, :3], key, key),
        (query.bfloat16(), key, key),
        (query, key.double(), key),
        (query.transpose(0, 2).contiguous().transpose(0, 2), key, key),
    ):
        with pytest.raises(ValueError, match=r"expected|share|KV is|dense"):
            plan.run(0, *bad, form)
    with pytest.raises(ValueError, match="window"):
        plan.run(0, query, key, key, AttentionForm(1.0, window=4))


@pytest.mark.parametrize(
    "planes",
    [
        (Plane("latent", 1, 8, "float32"),),
        (Plane("k", 1, 8, "float32"), Plane("v", 1, 16, "float32")),
        (Plane("k", 1, 8, "float16"), Plane("v", 1, 8, "float16")),
    ],
)
def test_layouts_that_it_cannot_serve_are_refused(planes: tuple[Plane, ...]) -> None:
    with pytest.raises(ValueError, match="native attention serves"):
        backend(KvPool(KvLayout(planes, (LayerGroup((0,)),)), 1, 1, CPU))


def test_each_layer_group_has_pages_of_its_own_number() -> None:
    planes = (Plane("k", 1, 8, "float32"), Plane("v", 1, 8, "float32"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,)), LayerGroup((1,), 4))), (10, 3), 4, CPU)
    attention, many, few = backend(pool), [np.array([7, 8, 9])], [np.array([0, 1, 2])]
    at = np.array([9]), np.array([1])
    attention.plan(AttentionBatch(*at, [many, few]))
    with pytest.raises(ValueError, match=r"the pool has 0\.\.2"):
        attention.plan(AttentionBatch(*at, [few, many]))
