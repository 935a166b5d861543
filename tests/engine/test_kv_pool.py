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

DRAFTED = KvLayout(
    (
        Plane("k", 2, 4, "bfloat16"),
        Plane("v", 2, 4, "bfloat16"),
        Plane("draft_k", 1, 6, "float32"),
        Plane("draft_v", 3, 2, "float32"),
    ),
    (
        LayerGroup((0, 2), None, ("k", "v")),
        LayerGroup((1,), 8, ("k", "v")),
        LayerGroup((3, 4), None, ("draft_k", "draft_v")),
    ),
)
"""With the layers of a drafter."""


def filled(layout: KvLayout, page_size: int, num_pages: int = 12, seed: int = 0) -> KvPool:
    pool = KvPool(layout, num_pages, page_size, CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in having(layout):
        tensor = pool.plane(name, layer)
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def having(layout: KvLayout) -> list[tuple[str, int]]:
    """Planes and layers in canonical order, without those that do not go together."""
    owners = layout.layer_groups
    return [
        (plane.name, layer)
        for plane in layout.planes
        for layer in range(layout.num_layers)
        if plane.name in (layout.groups[owners[layer]].planes or (plane.name,))
    ]


def canonical(pool: KvPool, pages: list[list[int]], span: Span, total: int = 0) -> bytes:
    """The order spelt out: plane, layer, token, head, dim. total: of a hand-over; 0 is all, whatever windows say."""
    parts = []
    for name, layer in having(pool.layout):
        number = next(n for n, group in enumerate(pool.layout.groups) if layer in group.layers)
        first = pool.layout.groups[number].moved_from(total)
        for token in range(max(span.start, first), span.end):
            slot = pages[number][token // pool.page_size] * pool.page_size + token % pool.page_size
            parts.append(pool.plane(name, layer)[slot].contiguous().view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("layout", [PLAIN, MIXED, DRAFTED])
@given(data=st.data())
def test_a_span_is_gathered_in_canonical_order_and_scattered_elsewhere(layout: KvLayout, data: st.DataObject) -> None:
    sizes = st.sampled_from((1, 4, 16))
    source = filled(layout, data.draw(sizes), num_pages=200, seed=1)
    target = filled(layout, data.draw(sizes), num_pages=200, seed=2)
    tokens = data.draw(st.sampled_from((1, 17, 40, 64, 80, 150)))
    start = data.draw(st.integers(0, tokens))
    span = Span(start, data.draw(st.integers(0, tokens - start)))

    def pages(pool: KvPool) -> list[list[int]]:
        count = -(-tokens // pool.page_size)
        chosen = data.draw(st.randoms(use_true_random=False))
        return [chosen.sample(range(pool.num_pages), count) for _ in layout.groups]

    own, other = pages(source), pages(target)
    out = bytearray(layout.span_bytes(span, tokens))
    source.gather(own, span, tokens, memoryview(out))
    assert bytes(out) == canonical(source, own, span, tokens)
    before = canonical(target, other, Span(0, start)), canonical(target, other, Span(span.end, tokens - span.end))
    target.scatter(other, span, tokens, memoryview(out))
    assert canonical(target, other, span, tokens) == bytes(out)
    after = canonical(target, other, Span(0, start)), canonical(target, other, Span(span.end, tokens - span.end))
    assert after == before


def test_what_a_window_does_not_see_is_neither_read_nor_written() -> None:
    """Of the second layer tokens 56..130 of 130 move, in whole blocks 0..130 for 64, and 64..130 from there on."""
    source, target = filled(MIXED, 16, seed=1), filled(MIXED, 16, seed=2)
    own = [list(range(9)), [-1, -1, -1, -1, 5, 6, 7, 8, 9]]
    assert MIXED.groups[1].moved_from(130) == 64
    before = target.plane("k", 1).clone()
    out = bytearray(MIXED.span_bytes(Span(60, 70), 130))
    source.gather(own, Span(60, 70), 130, out)
    assert len(out) == 70 * 2 * (16 + 24) + 66 * (16 + 24)
    target.scatter(own, Span(60, 70), 130, out)
    changed = (target.plane("k", 1) != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == list(range(5 * 16, 5 * 16 + 66))
    with pytest.raises(ValueError, match="before the pages that a window has left"):
        source.gather(own, Span(60, 4), 64, bytearray(MIXED.span_bytes(Span(60, 4), 64)))


def test_received_bytes_may_be_read_only() -> None:
    source, target = filled(PLAIN, 4, seed=1), filled(PLAIN, 4, seed=2)
    out = np.zeros(PLAIN.span_bytes(Span(1, 5), 6), dtype=np.uint8)
    source.gather([[3, 1]], Span(1, 5), 6, out)
    target.scatter([[0, 2]], Span(1, 5), 6, memoryview(out.tobytes()))
    assert canonical(target, [[0, 2]], Span(1, 5)) == out.tobytes()


def test_a_wrong_length_or_an_uncovered_span_changes_nothing() -> None:
    pool = filled(PLAIN, 4)
    before = canonical(pool, [list(range(12))], Span(0, 48))
    with pytest.raises(ValueError, match="a span of 2 tokens has 384 bytes, but the buffer has 383"):
        pool.scatter([[0]], Span(0, 2), 2, bytearray(383))
    with pytest.raises(ValueError, match="a span of 2 tokens has 384 bytes, but the buffer has 385"):
        pool.gather([[0]], Span(0, 2), 2, bytearray(385))
    with pytest.raises(ValueError, match=r"tokens 3\.\.5 are not within the 4"):
        pool.scatter([[0]], Span(3, 2), 5, bytearray(384))
    assert canonical(pool, [list(range(12))], Span(0, 48)) == before


@pytest.mark.parametrize("layout", [PLAIN, MIXED, DRAFTED])
@pytest.mark.parametrize("count", [0, 3, 4])
def test_the_first_tokens_of_a_page_are_copied_in_all_layers_of_its_group(layout: KvLayout, count: int) -> None:
    pool = filled(layout, 4)
    groups = len(layout.groups)
    source, target = [[5]] * groups, [[7]] * groups
    expected, rest = canonical(pool, source, Span(0, count)), canonical(pool, target, Span(count, 4 - count))
    for group in range(groups):
        assert count == 0 or canonical(pool, target, Span(0, count)) != expected
        pool.copy_tokens(group, 5, 7, count)
    assert canonical(pool, target, Span(0, count)) == expected
    assert canonical(pool, target, Span(count, 4 - count)) == rest
    with pytest.raises(ValueError, match="cannot copy 5 tokens of a page of 4"):
        pool.copy_tokens(0, 5, 7, 5)


def test_groups_have_pages_of_their_own() -> None:
    pool = KvPool(MIXED, (3, 5), 4, CPU)
    assert (pool.group_pages, pool.num_pages) == ((3, 5), 3)
    assert [pool.plane("k", layer).shape[0] for layer in range(3)] == [12, 20, 12]


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="a pool of 0 pages"):
        KvPool(PLAIN, 0, 16, CPU)
    with pytest.raises(ValueError, match="a pool of 0 pages"):
        KvPool(MIXED, (3, 0), 16, CPU)


def test_a_part_of_a_pool_is_the_same_memory() -> None:
    own = KvLayout((Plane("k", 1, 6, "float32"), Plane("v", 3, 2, "float32")), (LayerGroup((0, 1)),))
    whole = KvPool(DRAFTED, (3, 5, 7), 4, CPU)
    part = whole.part(own, 2, "draft_")
    assert (part.group_pages, part.page_size) == ((7,), 4)
    for layer in range(2):
        part.plane("v", layer).fill_(layer + 1)
        assert (whole.plane("draft_v", 3 + layer) == layer + 1).all()
    target = KvLayout(DRAFTED.planes[:2], DRAFTED.groups[:2])
    assert whole.part(target, 0).plane("k", 1).data_ptr() == whole.plane("k", 1).data_ptr()
    with pytest.raises(KeyError):
        whole.plane("k", 3)
