"""Triton kernels of what stands between the matrix products. `kernels/triton_ops.py` launches them. float32 inside."""
# Triton's compiler reads these functions; their arguments are its tensors, and types of ours would say nothing.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Constants of the compilation are written in capitals, as in all of Triton's literature.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, weight, out, inner, outer_stride, inner_stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Normalises `x` `[outer, inner, SIZE]`, last dimension dense. Grid: (outer * inner). out: dense."""
    row = tl.program_id(0).to(tl.int64)
    outer, at = row // inner, row % inner
    element = tl.arange(0, BLOCK)
    inside = element < SIZE
    value = tl.load(x + outer * outer_stride + at * inner_stride + element, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    factor = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + element, (wide * scale * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x, cos, sin, out, token_stride, head_stride, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rotates one head. x: `[tokens, HEADS, SIZE]`, last dimension dense; cos, sin: `[tokens, SIZE]`, dense.

    The pairs are (i, i + SIZE / 2); the sines carry the signs. Grid: (tokens, HEADS). out: dense.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.arange(0, BLOCK)
    inside = element < SIZE
    source = x + token * token_stride + head * head_stride
    own = tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(source + (element + SIZE // 2) % SIZE, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * SIZE + element, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * SIZE + element, mask=inside, other=0.0).to(tl.float32)
    target = out + (token * HEADS + head) * SIZE + element
    tl.store(target, (own * c + partner * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated(gate_up, out, stride, SIZE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """`activation(gate) * up` of `[tokens, 2 * SIZE]`, last dimension dense. Grid: (tokens, blocks of SIZE).

    out: dense. KIND: "silu", "gelu" or "gelu_tanh".
    """
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < SIZE
    gate = tl.load(gate_up + token * stride + element, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + SIZE + element, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        on = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        on = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # tanh(x) is 2 sigmoid(2 x) - 1, so that (1 + tanh(x)) / 2 is sigmoid(2 x).
        on = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + token * SIZE + element, (on * up).to(out.dtype.element_ty), mask=inside)
