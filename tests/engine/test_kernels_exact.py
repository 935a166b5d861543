"""Every kernel between the products, compiled and Triton's, over random shapes against torch in float64.

Attention has its own: `test_attention_native`, `test_attention_triton` and `test_attention_flashinfer`, over random
batches. Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tandem.config import cache_folder
from tandem.engine.kernels.build import build_library, find_compiler
from tandem.engine.kernels.native import NativeLibrary
from tandem.engine.kernels.native_ops import NativeOps
from tandem.engine.kernels.ops import Activation, Ops, TorchOps

# Where an exponential overflows, its reciprocal is the 0 that is meant; numpy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
EXACT = TorchOps()
DTYPES = {"native": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
ERRORS = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Of a result, absolute and relative. Triton's interpreter cuts float32 to bfloat16 where a GPU rounds."""
kinds = pytest.mark.parametrize("kind", DTYPES)
sizes = st.integers(1, 6)
seeds = st.integers(0, 1 << 20)


def ops_of(kind: str, threads: int = 1) -> Ops:
    if kind == "native":
        if find_compiler() is None:
            pytest.skip("no C++ compiler on this machine")
        return NativeOps(NativeLibrary(build_library(find_compiler(), cache_folder()), threads))
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from tandem.engine.kernels.triton_ops import TritonOps

    return TritonOps()


def dtype_of(kind: str, data: st.DataObject) -> torch.dtype:
    return data.draw(st.sampled_from(DTYPES[kind]))


def noise(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, and no element 0: a kernel that does nothing must not look right."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.masked_fill_(made == 0, 0.5)


def check(found: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    error = ERRORS[found.dtype]
    assert exact.dtype is torch.float64
    torch.testing.assert_close(found.double(), exact, atol=error * scale, rtol=error)


def examples(kind: str, count: int) -> settings:
    # The interpreter takes long: shrinking a failure would outlast the test's time.
    return settings(max_examples=count if kind == "native" else count // 4, phases=[Phase.generate])


@kinds
def test_norms_of_random_shapes(kind: str) -> None:
    ops = ops_of(kind, threads=3)

    @examples(kind, 60)
    @given(st.data(), st.lists(sizes, min_size=1, max_size=3), st.integers(1, 300), st.integers(0, 3), seeds)
    def prove(data: st.DataObject, outer: list[int], size: int, skipped: int, seed: int) -> None:
        dtype = dtype_of(kind, data)
        whole = noise(seed, *outer, size + skipped, dtype=dtype)
        x, weight, eps = (
            whole[..., skipped:],
            noise(seed + 1, size, dtype=dtype),
            data.draw(st.sampled_from((1e-6, 0.1))),
        )
        check(ops.rms_norm(x, weight, eps), EXACT.rms_norm(x.double(), weight.double(), eps), 3.0)

    prove()


@kinds
def test_rotations_of_random_shapes(kind: str) -> None:
    ops = ops_of(kind)

    @examples(kind, 60)
    @given(st.data(), sizes, st.integers(1, 5), st.integers(1, 64), st.integers(0, 2), seeds)
    def prove(data: st.DataObject, tokens: int, heads: int, half: int, skipped: int, seed: int) -> None:
        dtype = dtype_of(kind, data)
        whole = noise(seed, tokens, heads + skipped, 2 * half + 3 * skipped, dtype=dtype)
        x = whole[:, skipped:, 3 * skipped :]
        cos, sin = noise(seed + 1, tokens, 1, 2 * half, dtype=dtype), noise(seed + 2, tokens, 1, 2 * half, dtype=dtype)
        check(ops.rotate(x, cos, sin), EXACT.rotate(x.double(), cos.double(), sin.double()), 3.0)

    prove()


@kinds
def test_gates_of_random_shapes(kind: str) -> None:
    ops = ops_of(kind)

    @examples(kind, 60)
    @given(st.data(), sizes, st.integers(1, 300), st.integers(0, 3), st.sampled_from(get_args(Activation)), seeds)
    def prove(data: st.DataObject, rows: int, inner: int, skipped: int, name: Activation, seed: int) -> None:
        whole = noise(seed, rows, 2 * inner + skipped, dtype=dtype_of(kind, data)) * data.draw(st.sampled_from((1, 9)))
        x = whole[:, skipped:]
        check(ops.gated(name, x), EXACT.gated(name, x.double()), 3.0)

    prove()


@settings(max_examples=120, phases=[Phase.generate])
@given(
    st.sampled_from(DTYPES["native"]), st.integers(1, 40), st.integers(1, 150), st.integers(1, 90), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from((1, 3)), seeds,
)  # fmt: skip
def test_products_of_random_shapes(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, added: bool, wide: bool, threads: int,
    seed: int,
) -> None:  # fmt: skip
    ops = ops_of("native", threads)
    x = noise(seed, rows, inputs + 1, dtype=dtype)[:, 1:]
    weight = noise(seed + 1, outputs, inputs, dtype=dtype) / inputs**0.5
    bias = noise(seed + 2, outputs, dtype=dtype) if biased else None
    residual = noise(seed + 3, rows, outputs + 2, dtype=dtype)[:, 1:-1] if added else None
    exact = x.double() @ weight.double().T
    exact = exact if bias is None else exact + bias.double()
    exact = exact if residual is None else exact + residual.double()
    found = ops.linear(x, weight, bias, residual, wide)
    assert found.dtype is (torch.float32 if wide else dtype)
    error = ERRORS[dtype] * 6
    torch.testing.assert_close(found.double(), exact, atol=error, rtol=error)


@settings(max_examples=60, phases=[Phase.generate])
@given(
    st.sampled_from(DTYPES["native"]), st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 70), seeds
)
def test_embeddings_and_angles_of_random_shapes(dtype: torch.dtype, ids: list[int], half: int, seed: int) -> None:
    ops, table = ops_of("native"), noise(seed, 31, 2 * half, dtype=dtype)
    assert torch.equal(ops.embed(torch.tensor(ids), table), table[torch.tensor(ids)])
    positions = torch.tensor([at * at * 997 % 70_000 for at in ids])
    frequencies = 10_000.0 ** -(torch.arange(half) / half)
    cos, sin = ops.angles(positions, frequencies, 1.25, dtype)
    # The product of a position and a frequency is float32 for everyone: what is exact begins behind it.
    phase = (positions[:, None].float() * frequencies)[:, None].double()
    check(cos, torch.cat((phase.cos(), phase.cos()), dim=-1) * 1.25, 2.0)
    found, exact = sin.double(), torch.cat((-phase.sin(), phase.sin()), dim=-1) * 1.25
    torch.testing.assert_close(found, exact, atol=2 * ERRORS[dtype], rtol=ERRORS[dtype])
