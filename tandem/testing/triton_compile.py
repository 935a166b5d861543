"""Compiles the Triton kernels for GPUs that this machine need not have: `python -m tandem.testing.triton_compile`.

Prints one JSON object: kernel and variant -> bytes of shared memory.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tandem.engine.attention.triton_plan import tiles_for
from tandem.engine.kernels.gpu import attend, elementwise

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
Variant = tuple[str, Any, Mapping[str, str], Mapping[str, object]]
"""Name, kernel, types of the arguments that are not `*i32`, constants."""


def attention(dtype: str, dim: int, group: int) -> Iterator[Variant]:
    """The attention kernels of a model whose heads have `dim` elements."""
    name, tiles = f"{dtype} {dim}", tiles_for(group, dim, SIZES[dtype])
    shared = {"GROUP": group, "DIM": dim, "PAGE": 16, "BLOCK_N": tiles.context, "BLOCK_D": tiles.dim}
    tensors = dict.fromkeys(("query", "keys", "values", "key", "value"), f"*{dtype}")
    numbers = {"scale": "fp32", "softcap": "fp32", "query_token": "i32", "query_head": "i32"}
    for partial, trees in ((True, False), (False, False), (False, True)):
        lanes = tiles.decode if partial else tiles.chunk
        written = dict.fromkeys(("out", "sums", "peaks"), "*fp32" if partial else f"*{dtype}")
        special = {"WINDOW": 0 if partial else 100, "CAPPED": not partial, "PARTIAL": partial, "BLOCK_M": lanes}
        special["TREES"] = trees
        yield (
            f"attend {name} {lanes}{' trees' if trees else ''}",
            attend.attend,
            tensors | numbers | written,
            shared | special,
        )
    part = dict.fromkeys(("partial", "sums", "peaks"), "*fp32")
    yield f"combine {name}", attend.combine, {**part, "out": f"*{dtype}"}, {"DIM": dim, "BLOCK_D": tiles.dim}
    strides = dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
    yield f"store {name}", attend.store, tensors | strides, {"HEADS": 3, "DIM": dim, "BLOCK": 4 * tiles.dim}


def operations(dtype: str) -> Iterator[Variant]:
    """The kernels between the products."""
    names = ("x", "weight", "out", "cos", "sin", "gate_up")
    tensors = dict.fromkeys(names, f"*{dtype}")
    strides = ("outer_stride", "inner_stride", "token_stride", "head_stride", "stride")
    types = tensors | dict.fromkeys((*strides, "inner"), "i32") | {"eps": "fp32"}
    yield f"rms_norm {dtype}", elementwise.rms_norm, types, {"SIZE": 3000, "BLOCK": 4096}
    yield f"rotate {dtype}", elementwise.rotate, types, {"HEADS": 7, "SIZE": 80, "BLOCK": 128}
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield f"gated {dtype} {kind}", elementwise.gated, types, {"SIZE": 3000, "KIND": kind, "BLOCK": 1024}


def shared_memory(variant: Variant, capability: int) -> int:
    """Compiles one kernel for CUDA devices of this capability (80, 90); bytes of shared memory that it takes."""
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    _, kernel, types, constants = variant
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name].startswith("*")}
    source = triton.compiler.ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})
    return int(compiled.metadata.shared)


def main() -> None:
    """The variants that differ most."""
    found = {}
    variants = itertools.chain(attention("bf16", 128, 7), attention("fp32", 256, 4), operations("bf16"))
    for variant in variants:
        found[variant[0]] = shared_memory(variant, 90 if "128" in variant[0] else 80)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
