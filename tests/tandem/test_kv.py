"""Layouts, and the chain of block hashes against vectors computed by another implementation."""

from __future__ import annotations

import dataclasses
from itertools import cycle, islice, pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.kv import (
    BLOCK_TOKENS,
    DTYPE_BYTES,
    HashRoot,
    KvLayout,
    LayerGroup,
    Plane,
    Span,
    block_hashes,
    iter_block_hashes,
)

# Computed with an implementation of RFC 7693 written for the purpose, not with hashlib: parameter block with digest
# length, key length and personalisation; a key fills the first block.
ROOT = "bb1e672aa1d1962dfe4ac361918088ac8f42d39d7a68b8bc1752031b4da377da"
ROOT_WITH_ADAPTER_AND_SALT = "3ba7a7d5e4cba4e29c1b6bc6b7b3a8ea9ac255c0abb66630437844461e886c13"
CHAIN_OF_0_TO_127 = ["7c8827afe0cddc5f5bfe3b58b1246144", "ab42b044c76c7491f7e6f303b718177c"]
LARGEST_IDS_WITH_CONTENT = "d22df01a92854cd814360f923e0d1de9"
# printf %s 'KvLayout(planes=(...' | b2sum -l 128
LAYOUT_DIGEST = "a3faf593050afe6a36bd674aa48dcd3d"

K, V = Plane("k", 2, 64, "bfloat16"), Plane("v", 2, 64, "bfloat16")
LAYOUT = KvLayout((K, V), (LayerGroup((0, 1, 2)), LayerGroup((3,), window=128)))
patterns = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=8)
lengths = st.integers(0, 4 * BLOCK_TOKENS + 1)
tokens = st.builds(lambda pattern, length: list(islice(cycle(pattern), length)), patterns, lengths)
roots = st.binary(min_size=32, max_size=32)


def root() -> bytes:
    return HashRoot("tandem", "00ff", "bfloat16").digest()


def test_the_root_matches_its_known_answers() -> None:
    assert root().hex() == ROOT
    assert HashRoot("tandem", "00ff", "bfloat16", "lora-é", "tenant").digest().hex() == ROOT_WITH_ADAPTER_AND_SALT


def test_the_chain_matches_its_known_answers() -> None:
    assert [h.hex() for h in block_hashes(root(), range(2 * BLOCK_TOKENS))] == CHAIN_OF_0_TO_127
    largest = [(1 << 32) - 1] * BLOCK_TOKENS
    assert block_hashes(root(), largest, [bytes(range(16))])[0].hex() == LARGEST_IDS_WITH_CONTENT


def test_roots_do_not_collide_by_concatenation() -> None:
    parts = ("ab", "a", "b", "", "abc")
    digests = {fields: HashRoot(*fields).digest() for fields in set(permutations(parts))}
    assert len(set(digests.values())) == len(digests) == 120
    assert HashRoot("ab", "c", "").digest() != HashRoot("a", "bc", "").digest()
    assert HashRoot("k", "m", "d", "x", "").digest() != HashRoot("k", "m", "d", "", "x").digest()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HashRoot)])
def test_every_part_of_the_root_counts(field: str) -> None:
    base = HashRoot("key", "model", "bfloat16", "adapter", "salt")
    changed = dataclasses.replace(base, **{field: "other"})
    assert not set(block_hashes(base.digest(), range(128))) & set(block_hashes(changed.digest(), range(128)))


@given(roots, tokens)
def test_only_full_blocks_have_a_hash(key: bytes, ids: list[int]) -> None:
    hashes = block_hashes(key, ids)
    assert len(hashes) == len(ids) // BLOCK_TOKENS
    assert all(len(h) == 16 for h in hashes)
    assert hashes == block_hashes(key, ids[: len(hashes) * BLOCK_TOKENS])


@given(roots, tokens, st.integers(0, 4))
def test_a_chain_may_be_cut_and_go_on(key: bytes, ids: list[int], cut: int) -> None:
    whole = block_hashes(key, ids)
    head = whole[:cut]
    rest = block_hashes(key, ids[len(head) * BLOCK_TOKENS :], parent=head[-1] if head else b"")
    assert head + rest == whole
    assert list(islice(iter_block_hashes(key, ids), cut)) == head


@given(tokens.filter(lambda ids: len(ids) >= BLOCK_TOKENS), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(ids: list[int], data: st.DataObject) -> None:
    full = len(ids) // BLOCK_TOKENS
    position = data.draw(st.integers(0, full * BLOCK_TOKENS - 1))
    changed = [*ids[:position], ids[position] ^ 1, *ids[position + 1 :]]
    before, after = block_hashes(root(), ids), block_hashes(root(), changed)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [index < position // BLOCK_TOKENS for index in range(full)]


def test_equal_blocks_after_different_prefixes_differ() -> None:
    same = list(range(BLOCK_TOKENS))
    first, second = block_hashes(root(), same + same)
    assert first != second


def test_content_counts_in_its_block_and_after_it() -> None:
    ids = range(3 * BLOCK_TOKENS)
    plain = block_hashes(root(), ids, [b"", b"", b""])
    image = block_hashes(root(), ids, [b"", b"x" * 16, b""])
    assert plain == block_hashes(root(), ids)
    assert [a == b for a, b in zip(plain, image, strict=True)] == [True, False, False]


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_an_id_that_is_no_unsigned_32_bit_number_is_refused(token: int) -> None:
    with pytest.raises(Exception, match=r"argument|format|range"):
        block_hashes(root(), [token] * BLOCK_TOKENS)


def test_the_layout_digest_does_not_change() -> None:
    assert LAYOUT.digest() == LAYOUT_DIGEST


@pytest.mark.parametrize(
    "other",
    [
        KvLayout((V, K), LAYOUT.groups),
        KvLayout((K,), LAYOUT.groups),
        KvLayout((dataclasses.replace(K, dtype="float16"), V), LAYOUT.groups),
        KvLayout((dataclasses.replace(K, heads=1, head_dim=128), V), LAYOUT.groups),
        KvLayout((K, V), (LayerGroup((0, 1, 2)), LayerGroup((3,), window=64))),
        KvLayout((K, V), (LayerGroup((0, 1, 2, 3)),)),
    ],
)
def test_another_layout_has_another_digest(other: KvLayout) -> None:
    assert other.digest() != LAYOUT.digest()


def test_bytes_are_counted_over_planes_and_layers() -> None:
    assert K.token_bytes == 2 * 64 * 2
    assert LAYOUT.num_layers == 4
    assert LAYOUT.token_bytes == 4 * 2 * 256
    assert LAYOUT.span_bytes(Span(5, 10), 40) == 10 * LAYOUT.token_bytes
    assert {name: Plane("k", 1, 1, name).token_bytes for name in DTYPE_BYTES} == DTYPE_BYTES


def test_a_plane_counts_for_the_layers_that_have_it() -> None:
    own = Plane("draft_k", 1, 32, "float32")
    groups = (
        LayerGroup((0, 1), planes=("k", "v")),
        LayerGroup((2,), 64, ("k", "v")),
        LayerGroup((3,), None, ("draft_k",)),
    )
    layout = KvLayout((K, V, own), groups)
    assert [layout.group_bytes(group) for group in groups] == [2 * 512, 512, 128]
    assert layout.token_bytes == 3 * 512 + 128
    assert layout.span_bytes(Span(0, 10), 200) == 10 * (2 * 512 + 128)
    assert layout.digest() != KvLayout((K, V, own), (*groups[:2], LayerGroup((3,), None, ("k",)))).digest()
    with pytest.raises(ValueError, match="layer groups name planes w, which the layout does not have"):
        KvLayout((K, V), (LayerGroup((0,), None, ("k", "w")),))


def test_a_drafter_has_planes_and_groups_of_its_own() -> None:
    own = KvLayout((Plane("k", 1, 8, "float32"), Plane("v", 1, 8, "float32")), (LayerGroup((0,), 32), LayerGroup((1,))))
    both = LAYOUT.with_drafter(own)
    assert [plane.name for plane in both.planes] == ["k", "v", "draft_k", "draft_v"]
    assert both.groups == (
        LayerGroup((0, 1, 2), None, ("k", "v")),
        LayerGroup((3,), 128, ("k", "v")),
        LayerGroup((4,), 32, ("draft_k", "draft_v")),
        LayerGroup((5,), None, ("draft_k", "draft_v")),
    )
    assert both.token_bytes == LAYOUT.token_bytes + own.token_bytes
    assert (both.has_drafter, LAYOUT.has_drafter) == (True, False)


def test_a_window_ends_at_its_position() -> None:
    """Position p sees (p - 4, p]."""
    group = LayerGroup((0,), window=4)
    assert [group.seen_from(position) for position in (0, 3, 4, 10)] == [0, 0, 1, 7]
    assert LayerGroup((0,)).seen_from(10) == 0
    assert LayerGroup((0,), window=1).seen_from(10) == 10
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        LayerGroup((0,), window=0)


@given(st.integers(0, 2000), st.integers(1, 300), st.sampled_from([1, 16, 64]))
def test_what_is_moved_is_seen_from_the_end_and_from_its_last_whole_page(total: int, window: int, page: int) -> None:
    """Whole blocks, and so whole pages; of the window and less than two blocks beside it."""
    group = LayerGroup((0,), window)
    first = group.moved_from(total)
    assert first % BLOCK_TOKENS == 0
    assert first <= group.seen_from(total // page * page) <= group.seen_from(total)
    assert total - first <= window - 1 + 2 * (BLOCK_TOKENS - 1)
    assert LayerGroup((0,)).moved_from(total) == 0


@given(st.data())
def test_the_spans_of_a_hand_over_have_each_token_of_each_group_once(data: st.DataObject) -> None:
    windows = data.draw(st.sampled_from([(None,), (None, 70), (9,), (9, 200), (None, 1, 64)]))
    layout = KvLayout((K, V), tuple(LayerGroup((layer,), window) for layer, window in enumerate(windows)))
    total = data.draw(st.integers(1, 400))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=5))})
    spans = [Span(start, end - start) for start, end in pairwise(cuts)]
    for number, group in enumerate(layout.groups):
        shares = [layout.shares(span, total)[number] for span in spans]
        tokens = [token for share in shares for token in range(share.start, share.end)]
        assert tokens == list(range(group.moved_from(total), total))
    sizes = [layout.span_bytes(span, total) for span in spans]
    each = K.token_bytes + V.token_bytes
    assert sum(sizes) == each * sum(total - group.moved_from(total) for group in layout.groups)
    assert all((size == 0) == (span.end <= layout.moved_from(total)) for span, size in zip(spans, sizes, strict=True))


def test_layers_know_their_groups() -> None:
    layout = KvLayout((K,), (LayerGroup((1, 3)), LayerGroup((0, 2), window=5)))
    assert layout.layer_groups == (1, 0, 1, 0)


@pytest.mark.parametrize("layers", [((0, 1), (1,)), ((1, 2),), ((0,), (2,))])
def test_groups_that_miss_or_repeat_a_layer_are_refused(layers: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"^layer groups must cover layers 0\.\.\d once each$"):
        KvLayout((K, V), tuple(LayerGroup(group) for group in layers))


def test_the_end_of_a_span_is_one_past_its_last_token() -> None:
    assert Span(3, 4).end == 7


def test_a_parent_is_not_taken_for_content() -> None:
    block, shifted = list(range(BLOCK_TOKENS)), b"\x01" * 16
    chained = block_hashes(root(), block, parent=shifted)
    assert chained != block_hashes(root(), block, [shifted])
    assert chained != block_hashes(root(), block)
