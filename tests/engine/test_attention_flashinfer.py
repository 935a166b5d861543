"""FlashInfer's wrappers get what they document: shown by a stand-in that computes from the recorded arguments."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.attention.base import AttentionBatch, AttentionForm
from tandem.engine.attention.flashinfer import FlashInferAttention, load_flashinfer
from tandem.engine.kv_pool import KvPool
from tandem.errors import ConfigError
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.attention import AttentionCase, attend
from tandem.testing.flashinfer import FakeFlashInfer

CPU = torch.device("cpu")
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}


def check(case: AttentionCase) -> FakeFlashInfer:
    library = FakeFlashInfer()
    result = attend(case, lambda pool: FlashInferAttention(pool, library), others_finite=True)
    tolerance = TOLERANCE[case.dtype]
    assert result.found.dtype == getattr(torch, case.dtype)
    torch.testing.assert_close(result.found.double(), result.expected, atol=tolerance, rtol=tolerance)
    return library


@settings(max_examples=40)
@given(
    st.builds(
        AttentionCase,
        rows=st.lists(st.tuples(st.integers(0, 70), st.sampled_from((1, 1, 1, 2, 5, 20))), min_size=1, max_size=5).map(
            tuple
        ),
        kv_heads=st.sampled_from((1, 2)),
        group=st.sampled_from((1, 2, 7)),
        dim=st.just(64),
        page_size=st.sampled_from((1, 4, 16, 64)),
        dtype=st.sampled_from(("bfloat16", "float16")),
        window=st.sampled_from((None, None, 1, 7, 33)),
        softcap=st.sampled_from((None, None, 2.0, 30.0)),
    )
)
def test_any_batch_is_described_as_its_rows_are(case: AttentionCase) -> None:
    check(case)


def test_decoding_rows_and_chunks_go_to_their_wrappers() -> None:
    library = check(AttentionCase(((16, 1), (15, 1), (0, 9), (7, 1)), dim=64, dtype="float16"))
    assert [(plan.wrapper, plan.causal) for plan in library.plans] == [("decode", False), ("prefill", True)]
    decode, prefill = library.plans
    assert (decode.indptr, decode.last_page_len) == ([0, 2, 3], [1, 16])
    assert (prefill.indptr, prefill.last_page_len, prefill.query_indptr) == ([0, 1, 2], [9, 8], [0, 9, 10])
    assert decode.window_left == -1


def test_a_window_counts_the_positions_before_a_query_and_leaves_out_the_pages_before_it() -> None:
    library = check(AttentionCase(((70, 1), (69, 4)), dim=64, dtype="float16", window=33))
    decode, prefill = library.plans
    assert decode.window_left == prefill.window_left == 32
    assert (len(decode.indices), decode.last_page_len) == (3, [7])  # positions 38..70, pages 2..4
    assert (len(prefill.indices), prefill.last_page_len) == (3, [9])  # positions 37..72


def make_pool(dim: int = 64, dtype: str = "bfloat16", window: int | None = 5) -> KvPool:
    planes = (Plane("k", 2, dim, dtype), Plane("v", 2, dim, dtype))
    return KvPool(KvLayout(planes, (LayerGroup((0, 2)), LayerGroup((1,), window))), 6, 4, CPU)


def test_layers_of_a_form_share_one_plan_and_batches_share_wrappers_and_the_pools_memory() -> None:
    library, pool = FakeFlashInfer(), make_pool()
    backend = FlashInferAttention(pool, library)
    full, windowed = AttentionForm(0.1), AttentionForm(0.1, 5)
    query, new = torch.randn(1, 4, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    for start in (3, 4):
        pages = [np.array([2, 5])]
        plan = backend.plan(AttentionBatch(np.array([start]), np.array([1]), [pages, pages]))
        for layer, form in ((0, full), (1, windowed), (2, full)):
            plan.run(layer, query, new, new, form)
    assert library.wrappers == ["decode", "decode"]
    assert [(plan.window_left, plan.last_page_len) for plan in library.plans] == [
        (-1, [4]),
        (4, [4]),
        (-1, [1]),
        (4, [1]),
    ]
    first = [key.data_ptr() for key, _ in library.plans[0].caches]
    assert first == [pool.plane("k", 0).data_ptr(), pool.plane("k", 2).data_ptr()]
    assert library.plans[1].caches[0][1].data_ptr() == pool.plane("v", 1).data_ptr()
    with pytest.raises(ValueError, match="window"):
        plan.run(0, query, new, new, windowed)


@pytest.mark.parametrize(
    ("pages", "match"),
    [([np.array([2])], "row 0 has 1 pages; 2 are needed"), ([np.array([2, 6])], "pages are 2..6")],
)
def test_pages_that_are_not_there_are_refused(
    pages: list[np.ndarray[tuple[int], np.dtype[np.int64]]], match: str
) -> None:
    backend = FlashInferAttention(make_pool(), FakeFlashInfer())
    with pytest.raises(ValueError, match=match):
        backend.plan(AttentionBatch(np.array([4]), np.array([1]), [pages, pages]))
    with pytest.raises(ValueError, match="pages of 1 layer groups; the pool has 2"):
        backend.plan(AttentionBatch(np.array([4]), np.array([1]), [pages]))


def test_what_it_does_not_serve_is_refused() -> None:
    for pool in (make_pool(dim=80), make_pool(dtype="float32")):
        with pytest.raises(ConfigError, match="it serves heads of 64, 128 and 256"):
            FlashInferAttention(pool, FakeFlashInfer())
    latent = KvPool(KvLayout((Plane("latent", 1, 64, "float16"),), (LayerGroup((0,)),)), 1, 1, CPU)
    with pytest.raises(ConfigError, match="planes k and v"):
        FlashInferAttention(latent, FakeFlashInfer())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="attention is flashinfer, which cannot be imported"):
        load_flashinfer()
