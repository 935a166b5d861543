"""A node of a tree attends to what it would attend to at the end of a chain of its path."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.device import resolve_device
from tandem.engine.attention.base import AttentionBackend, AttentionBatch, AttentionForm
from tandem.engine.attention.native import NativeAttention
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kv_pool import KvPool
from tandem.engine.sequence import ROOT, Draft
from tandem.kv import KvLayout, LayerGroup, Plane

DIM, HEADS, KV_HEADS = 16, 6, 2


def native(pool: KvPool) -> AttentionBackend:
    library = choose_kernels("native", resolve_device("cpu")).library
    assert library is not None
    return NativeAttention(pool, library)


def triton(pool: KvPool) -> AttentionBackend:
    from tandem.engine.attention.triton_paged import TritonPagedAttention  # imports triton

    return TritonPagedAttention(pool, part_tokens=32)


BACKENDS: dict[str, Callable[[KvPool], AttentionBackend]] = {"native": native, "torch": TorchPagedAttention}
if importlib.util.find_spec("triton") is not None:
    BACKENDS["triton"] = triton


def make_pool(page_size: int, pages: int, window: int | None) -> KvPool:
    planes = tuple(Plane(name, KV_HEADS, DIM, "float32") for name in ("k", "v"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,), window),)), pages, page_size, torch.device("cpu"))
    for name in ("k", "v"):
        pool.plane(name, 0).fill_(torch.nan if page_size == 1 else 1e3)
    return pool


class Tokens:
    """Queries, keys and values: of a history, and of what is computed now."""

    def __init__(self, history: int, new: int) -> None:
        generator = torch.Generator().manual_seed(history * 100 + new)
        self.history = torch.randn((2, history, KV_HEADS, DIM), generator=generator)
        self.query = torch.randn((new, HEADS, DIM), generator=generator)
        self.key, self.value = torch.randn((2, new, KV_HEADS, DIM), generator=generator)

    def run(
        self, make: Callable[[KvPool], AttentionBackend], page_size: int, form: AttentionForm, chosen: list[int],
        trees: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]],
    ) -> torch.Tensor:  # fmt: skip
        """Of the chosen new tokens behind the history, beside another sequence that decodes."""
        history, total = self.history.shape[1], self.history.shape[1] + len(chosen)
        pages = -(-total // page_size)
        pool = make_pool(page_size, pages + 1, form.window)
        order = np.random.default_rng(total).permutation(pages + 1)
        where = order[np.arange(total) // page_size] * page_size + np.arange(total) % page_size
        for name, stored in zip(("k", "v"), self.history, strict=True):
            pool.plane(name, 0)[torch.from_numpy(where[:history])] = stored
        batch = AttentionBatch(
            np.array([0, history]), np.array([1, len(chosen)]), [[order[pages:], order[:pages]]], trees
        )
        at = [0, *chosen]
        plan = make(pool).plan(batch)
        return plan.run(0, self.query[at], self.key[at], self.value[at], form)[1:]


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(draw(st.integers(1, 14))))
    return Draft(tuple(range(len(parents))), parents)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(BACKENDS)), st.integers(0, 90), st.integers(1, 3), drafts(), st.sampled_from([1, 4, 16]),
    st.sampled_from([None, None, 1, 3, 8, 40]), st.sampled_from([None, None, 5.0]),
)  # fmt: skip
def test_nodes_see_their_paths(
    backend: str, history: int, own: int, draft: Draft, page_size: int, window: int | None, softcap: float | None
) -> None:
    form, tokens = AttentionForm(DIM**-0.5, window, softcap), Tokens(history, own + len(draft))
    whole = list(range(own + len(draft)))
    found = tokens.run(BACKENDS[backend], page_size, form, whole, {1: np.array(draft.lineage())})
    chain = tokens.run(BACKENDS[backend], page_size, form, whole[:own], {})
    torch.testing.assert_close(found[:own], chain, atol=2e-5, rtol=2e-5)
    for node in range(len(draft)):
        path = [*range(own), *(own + each for each in draft.path(node))]
        expected = tokens.run(BACKENDS[backend], page_size, form, path, {})
        torch.testing.assert_close(found[own + node], expected[-1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_large_tree_is_cut_into_tasks_and_seen_whole(backend: str) -> None:
    draft = Draft(tuple(range(63)), tuple(max(node - 3, ROOT) for node in range(63)))
    form, tokens = AttentionForm(DIM**-0.5), Tokens(70, 64)
    found = tokens.run(BACKENDS[backend], 16, form, list(range(64)), {1: np.array(draft.lineage())})
    for node in (0, 17, 62):
        path = [0, *(1 + each for each in draft.path(node))]
        expected = tokens.run(BACKENDS[backend], 16, form, path, {})
        torch.testing.assert_close(found[1 + node], expected[-1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("words", "count"), [([1, 4], 3), ([1, 3], 2), ([0, 2], 3), ([2, 2], 3)])
def test_trees_that_are_none_are_refused(words: list[int], count: int) -> None:
    batch = AttentionBatch(np.array([0]), np.array([count]), [[np.array([0])]], {0: np.array(words)})
    with pytest.raises(ValueError, match="row 0 has a tree of 2 tokens"):
        native(make_pool(16, 1, None)).plan(batch)
