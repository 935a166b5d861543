"""Pages in, canonical spans out, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.kv_pool import KvPool
from tandem.kv import KvLayout, LayerGroup, Plane, Span

CPU = torch.device("cpu")
PLAIN = KvLayout((Plane("k", 2, 4, "float32"), Plane("v", 2, 4, "float32")), (LayerGroup((0, 1, 2)),))
MIXED = KvLayout(
    (Plane("k", 2, 4, "bfloat16"), Plane("v", 1, 6, "float32")), (LayerGroup((0, 2)), LayerGroup((1,), window=8))
)


def filled(layout: KvLayout, page_size: int, num_pages: int = 12, seed: int = 0) -> KvPool:
    pool = KvPool(layout, num_pages, page_size, CPU)
    generator = torch.Generator().manual_seed(seed)
    for plane in layout.planes:
        for layer in range(layout.num_layers):
            tensor = pool.plane(plane.name, layer)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def canonical(pool: KvPool, pages: list[int], span: Span) -> bytes:
    """The order spelt out: plane, layer, token, head, dim."""
    parts = []
    for plane in pool.layout.planes:
        for layer in range(pool.layout.num_layers):
            for token in range(span.start, span.end):
                slot = pages[token // pool.page_size] * pool.page_size + token % pool.page_size
                parts.append(pool.plane(plane.name, layer)[slot].contiguous().view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("layout", [PLAIN, MIXED])
@given(data=st.data())
def test_a_span_is_gathered_in_canonical_order_and_scattered_elsewhere(layout: KvLayout, data: st.DataObject) -> None:
    sizes = st.sampled_from((1, 4, 16))
    source = filled(layout, data.draw(sizes), num_pages=40, seed=1)
    target = filled(layout, data.draw(sizes), num_pages=40, seed=2)
    tokens = data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, tokens))
    span = Span(start, data.draw(st.integers(0, tokens - start)))

    def pages(pool: KvPool) -> list[int]:
        count = -(-tokens // pool.page_size)
        return data.draw(st.permutations(range(pool.num_pages)))[:count]

    own, other = pages(source), pages(target)
    out = bytearray(layout.span_bytes(span.count))
    source.gather(own, span, memoryview(out))
    assert bytes(out) == canonical(source, own, span)
    before = canonical(target, other, Span(0, start)), canonical(target, other, Span(span.end, tokens - span.end))
    target.scatter(other, span, memoryview(out))
    assert canonical(target, other, span) == bytes(out)
    after = canonical(target, other, Span(0, start)), canonical(target, other, Span(span.end, tokens - span.end))
    assert after == before


def test_received_bytes_may_be_read_only() -> None:
    source, target = filled(PLAIN, 4, seed=1), filled(PLAIN, 4, seed=2)
    out = np.zeros(PLAIN.span_bytes(5), dtype=np.uint8)
    source.gather([3, 1], Span(1, 5), out)
    target.scatter([0, 2], Span(1, 5), memoryview(out.tobytes()))
    assert canonical(target, [0, 2], Span(1, 5)) == out.tobytes()


def test_a_wrong_length_or_an_uncovered_span_changes_nothing() -> None:
    pool = filled(PLAIN, 4)
    before = canonical(pool, list(range(12)), Span(0, 48))
    with pytest.raises(ValueError, match="a span of 2 tokens has 384 bytes, but the buffer has 383"):
        pool.scatter([0], Span(0, 2), bytearray(383))
    with pytest.raises(ValueError, match="a span of 2 tokens has 384 bytes, but the buffer has 385"):
        pool.gather([0], Span(0, 2), bytearray(385))
    with pytest.raises(ValueError, match=r"tokens 3\.\.5 are not within the 4"):
        pool.scatter([0], Span(3, 2), bytearray(384))
    assert canonical(pool, list(range(12)), Span(0, 48)) == before


@pytest.mark.parametrize("layout", [PLAIN, MIXED])
@pytest.mark.parametrize("count", [0, 3, 4])
def test_the_first_tokens_of_a_page_are_copied_in_all_layers(layout: KvLayout, count: int) -> None:
    pool = filled(layout, 4)
    source, rest = canonical(pool, [5], Span(0, count)), canonical(pool, [7], Span(count, 4 - count))
    pool.copy_tokens(5, 7, count)
    assert canonical(pool, [7], Span(0, count)) == source
    assert canonical(pool, [7], Span(count, 4 - count)) == rest
    with pytest.raises(ValueError, match="cannot copy 5 tokens of a page of 4"):
        pool.copy_tokens(5, 7, 5)


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="a pool of 0 pages"):
        KvPool(PLAIN, 0, 16, CPU)
