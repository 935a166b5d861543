"""Triton kernels of paged attention: store, attend, combine. `attention/triton_paged.py` launches them.

FlashAttention: Dao et al. 2022, arXiv:2205.14135. Parts of a long context side by side: Flash-Decoding, Dao et al.
2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

# Triton's compiler reads these functions; their arguments are its tensors, and types of ours would say nothing.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Constants of the compilation are written in capitals, as in all of Triton's literature.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(a, b):
    """A product accumulated in float32. The interpreter's own takes the bits of bfloat16 for integers (Triton 3.7)."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def store(
    key, value, keys, values, slots, key_token, key_head, value_token, value_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one token's keys and values, all heads, to its slot. A slot below 0 is written nowhere.

    key, value: `[tokens, HEADS, DIM]`, last dimension dense. keys, values: `[slots, HEADS, DIM]`, dense. Grid: tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    element = tl.arange(0, BLOCK)
    head, at = element // DIM, element % DIM
    target = slot * HEADS * DIM + element
    inside = (element < HEADS * DIM) & (target >= 0)
    new = tl.load(key + token * key_token + head * key_head + at, mask=inside)
    tl.store(keys + target, new, mask=inside)
    new = tl.load(value + token * value_token + head * value_head + at, mask=inside)
    tl.store(values + target, new, mask=inside)


@triton.jit
def _scores(q, k, behind, seen, scale, softcap, WINDOW: tl.constexpr, CAPPED: tl.constexpr):
    """`[BLOCK_M, BLOCK_N]`, float32: minus infinity where a query does not see a key.

    behind: by how many positions the key stands before the query. seen: what is hidden for no other reason.
    """
    scores = _dot(q, tl.trans(k)) * scale
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    visible = seen & (behind >= 0)
    if WINDOW:
        visible = visible & (behind < WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _related(node, low, high, other):
    """Whether the tree's token `node` sees its token `other`, `[BLOCK_M, BLOCK_N]`; below 0: tokens before the tree.

    low, high: the bits of what a token of the tree sees.
    """
    at = other[None, :]
    bits = tl.where(at < 32, low[:, None] >> tl.maximum(tl.minimum(at, 31), 0), high[:, None] >> tl.maximum(at - 32, 0))
    return (at < 0) | ((node[:, None] >= 0) & ((bits & 1) == 1))


@triton.jit
def _absorb(scores, v, peak, total, acc):
    """One step of the online softmax: the largest score, the sum of weights, the weighted values."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    # A lane that has seen nothing yet has no finite peak, and infinity less infinity is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + _dot(weights.to(v.dtype), v)
    return higher, total, acc


@triton.jit
def _four(table, row):
    """A row of `[rows, 4]`."""
    first = table + row * 4
    return tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3)


@triton.jit
def _node(places, lineage, token, real):
    """Of tokens: their positions, and the lower and upper bits of what they see of their tree."""
    place = tl.load(places + token, mask=real, other=0)
    low = tl.load(lineage + token * 2, mask=real, other=0)
    return place, low, tl.load(lineage + token * 2 + 1, mask=real, other=0)


@triton.jit
def _place(places, slot, fresh, stored):
    """Positions of keys: of those before a row's new tokens, by slot; of the new ones, what `places` says."""
    return tl.where(fresh >= 0, tl.load(places + fresh, mask=stored & (fresh >= 0), other=0), slot)


@triton.jit
def _write(out, heads, acc, total, at, real, DIM: tl.constexpr):
    """What heads of tokens attended to, in the dtype of `out`, `[tokens * heads, DIM]`."""
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + (heads * DIM)[:, None] + at[None, :], result.to(out.dtype.element_ty), mask=real)


@triton.jit
def attend(
    query, keys, values, out, sums, peaks, items, rows, pages, nodes, places, lineage,
    scale, softcap, query_token, query_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr, TREES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one row against a range of its context. Grid: (items, kv_heads).

    A tile's lane is a pair (new token, query head of the group): grouped queries share each key that is read.
    query: `[tokens, heads, DIM]`, last dimension dense. keys, values: `[slots, kv_heads, DIM]`, dense. WINDOW 0: none.
    items: `[items, 4]` row, first lane, begin and end of the range of positions. rows: `[rows, 4]` start, count, first
    token, where page 0 of the row is or would be in `pages`. out: `[tokens, heads, DIM]`; PARTIAL: float32 `[items,
    heads, DIM]`, with sums of weights and largest scores `[items, heads]` beside it. TREES: nodes `[rows]` how many of
    a row's last tokens are a tree, whose keys lie in their order; places `[tokens]` positions; lineage `[tokens, 2]`.
    """
    item, kv_head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, first_lane, begin, end = _four(items, item)
    start, count, token, first_page = _four(rows, row.to(tl.int64))
    lane = first_lane + tl.arange(0, BLOCK_M)
    step, head, heads = lane // GROUP, kv_head * GROUP + lane % GROUP, kv_heads * GROUP
    at = tl.arange(0, BLOCK_D)
    real, inside = (step < count)[:, None], (at < DIM)[None, :]
    new = (token + step).to(tl.int64)
    source = query + new[:, None] * query_token + head[:, None] * query_head + at[None, :]
    q = tl.load(source, mask=real & inside, other=0.0)
    peak, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    asking = start + step
    if TREES:
        own = count - tl.load(nodes + row)  # tokens before the tree
        asking, low, high = _node(places, lineage, new, step < count)
    for first in range(begin, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        stored = position < end
        at_place, seen = position, stored[None, :]
        if TREES:
            at_place = _place(places + token, position, position - start, stored)
            seen = seen & _related(step - own, low, high, position - start - own)
        page = tl.load(pages + first_page + position // PAGE, mask=stored, other=0).to(tl.int64)
        where = (((page * PAGE + position % PAGE) * kv_heads + kv_head) * DIM)[:, None] + at[None, :]
        k = tl.load(keys + where, mask=stored[:, None] & inside, other=0.0)
        scores = _scores(q, k, asking[:, None] - at_place[None, :], seen, scale, softcap, WINDOW, CAPPED)
        v = tl.load(values + where, mask=stored[:, None] & inside, other=0.0)
        peak, total, acc = _absorb(scores, v, peak, total, acc)
    if PARTIAL:
        tl.store(out + ((item * heads + head) * DIM)[:, None] + at[None, :], acc, mask=real & inside)
        tl.store(sums + item * heads + head, total, mask=step < count)
        tl.store(peaks + item * heads + head, peak, mask=step < count)
    else:
        _write(out, new * heads + head, acc, total, at, real & inside, DIM)


@triton.jit
def combine(partial, sums, peaks, out, firsts, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Joins what `attend` left for the parts of one decoding row's context. Grid: (decoding rows, heads).

    partial: `[items, heads, DIM]`, sums and peaks `[items, heads]`, float32. firsts: `[decoding rows + 1]` first item
    of each. The decoding rows are the first of `rows`; one without
    a part yields zeros. out: `[tokens, heads, DIM]`.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    at = tl.arange(0, BLOCK_D)
    inside = at < DIM
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.load(firsts + row).to(tl.int64)
    for part in range(tl.load(firsts + row + 1) - tl.load(firsts + row)):
        which = (first + part) * heads + head
        part_peak, part_total = tl.load(peaks + which), tl.load(sums + which)
        higher = tl.maximum(peak, part_peak)
        shrink, grow = tl.exp(peak - higher), tl.exp(part_peak - higher)
        total = total * shrink + part_total * grow
        acc = acc * shrink + tl.load(partial + which * DIM + at, mask=inside, other=0.0) * grow
        peak = higher
    token = tl.load(rows + row * 4 + 2).to(tl.int64)
    result = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (token * heads + head) * DIM + at, result.to(out.dtype.element_ty), mask=inside)
