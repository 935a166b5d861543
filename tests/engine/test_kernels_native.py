"""Every compiled operation against torch's, over shapes, dtypes, strides and threads; and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from tandem.config import cache_folder
from tandem.engine.kernels.build import build_library, find_compiler
from tandem.engine.kernels.native import NativeLibrary
from tandem.engine.kernels.native_ops import FEW_ROWS, NativeOps
from tandem.engine.kernels.ops import Activation, TorchOps

COMPILER = find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
DTYPES = [torch.float32, torch.bfloat16]
EXACT = TorchOps()


@pytest.fixture(scope="module", params=[1, 3], ids=["one thread", "three threads"])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(NativeLibrary(build_library(COMPILER, cache_folder()), request.param))


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    """bfloat16: half a unit in the last place, and a little for what was rounded on the way."""
    assert found.dtype is exact.dtype or exact.dtype is torch.float64
    wide = 6e-3 if found.dtype is torch.bfloat16 else 3e-6
    torch.testing.assert_close(found.double(), exact.double(), atol=wide * scale, rtol=wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256), (5, 17), (3, 4, 24), (2, 3, 4, 8), (700, 128)])
def test_rms_norm(ops: NativeOps, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = noise(*shape, dtype=dtype), noise(shape[-1], dtype=dtype)
    exact = EXACT.rms_norm(x.double(), weight.double(), 1e-5)
    close(ops.rms_norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_parts_of_a_larger_tensor(ops: NativeOps, dtype: torch.dtype) -> None:
    merged, weight = noise(6, 9, 33, dtype=dtype), noise(32, dtype=dtype)
    for part in (merged[:, 2:7, 1:], merged[::2, ::3, :32], merged[..., 1:].transpose(0, 1), merged[:, 4, :32]):
        close(ops.rms_norm(part, weight, 1e-6), EXACT.rms_norm(part.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 8, 24, 32, 80, 128, 256])
def test_rotate(ops: NativeOps, size: int, dtype: torch.dtype) -> None:
    for tokens in (1, 7, 90):
        merged = noise(tokens, 6, size + 3, dtype=dtype)
        cos, sin = noise(tokens, 1, size, dtype=dtype), noise(tokens, 1, size, dtype=dtype, seed=2)
        for heads in (merged[:, 1:5, :size], merged[:, :3, 3:]):
            close(ops.rotate(heads, cos, sin), EXACT.rotate(heads.double(), cos.double(), sin.double()), 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated(ops: NativeOps, activation: Activation, dtype: torch.dtype) -> None:
    for rows, inner in ((1, 704), (5, 13), (200, 512)):
        wide = noise(rows, 2 * inner + 4, dtype=dtype) * 3
        for x in (wide[:, 4:], wide[:, : 2 * inner].contiguous()):
            close(ops.gated(activation, x), EXACT.gated(activation, x.double()))
    extreme = torch.tensor([[-1e4, -80.0, 0.0, 80.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    close(ops.gated(activation, extreme), EXACT.gated(activation, extreme.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 32, 33])
def test_linear(ops: NativeOps, rows: int, dtype: torch.dtype) -> None:
    for inputs, outputs in ((64, 48), (33, 17), (256, 5), (100, 160), (704, 256)):
        x, weight = noise(rows, inputs, dtype=dtype), noise(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5
        bias, residual = noise(outputs, dtype=dtype), noise(rows, outputs + 2, dtype=dtype)[:, 1:-1]
        exact = x.double() @ weight.double().T
        close(ops.linear(x, weight), exact, 3.0)
        close(ops.linear(x, weight, bias), exact + bias.double(), 3.0)
        wide = ops.linear(x, weight, bias, wide=True)
        assert wide.dtype is torch.float32
        close(ops.linear(x, weight, bias, residual), exact + bias.double() + residual.double(), 6.0)
        padded = noise(rows, inputs + 5, dtype=dtype)
        padded[:, 2:-3] = x
        assert rows > FEW_ROWS[dtype] or torch.equal(ops.linear(padded[:, 2:-3], weight), ops.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_does_not_depend_on_the_others(ops: NativeOps, dtype: torch.dtype) -> None:
    x, weight = noise(FEW_ROWS[dtype], 96, dtype=dtype), noise(50, 96, dtype=dtype, seed=1)
    whole = ops.linear(x, weight)
    for rows in range(1, len(x)):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_angles(ops: NativeOps, dtype: torch.dtype) -> None:
    table, tokens = noise(11, 24, dtype=dtype), torch.tensor([3, 0, 10, 3])
    assert torch.equal(ops.embed(tokens, table), table[tokens])
    strangers = ops.embed(torch.tensor([11, -1, 1 << 40, 2]), table)
    assert strangers[:3].isnan().all()
    assert torch.equal(strangers[3], table[2])
    positions, frequencies = torch.tensor([0, 1, 77, 130_000]), 10_000.0 ** -(torch.arange(0, 32, 2) / 32)
    found, exact = (each.angles(positions, frequencies, 1.25, dtype) for each in (ops, EXACT))
    for mine, theirs in zip(found, exact, strict=True):
        close(mine, theirs)


def test_what_is_not_finite_stays_so(ops: NativeOps) -> None:
    for bad in (torch.nan, torch.inf):
        for dtype in DTYPES:
            x, weight = noise(3, 64, dtype=dtype), noise(64, 64, dtype=dtype)
            x[1, 5] = bad
            out = ops.linear(x, weight)
            assert not out[1].isfinite().any()
            assert out[0].isfinite().all()
            assert out[2].isfinite().all()
            assert not ops.rms_norm(x, weight[0], 1e-5)[1].isfinite().all()
            assert not ops.gated("silu", x)[1].isfinite().all()


def test_tensors_that_do_not_fit_are_refused(ops: NativeOps) -> None:
    x, square = noise(3, 32), noise(32, 32)
    narrow, tokens = square.bfloat16(), torch.tensor([1])
    calls: list[tuple[Any, ...]] = [
        (ops.linear, x, noise(32, 31)),
        (ops.linear, x, narrow),
        (ops.linear, x, noise(64, 32)[::2]),
        (ops.linear, x, square, noise(31)),
        (ops.linear, x, square, None, noise(2, 32)),
        (ops.rms_norm, x, noise(31), 1e-5),
        (ops.rms_norm, x, noise(32).bfloat16(), 1e-5),
        (ops.rotate, noise(2, 3, 8), noise(2, 1, 8), noise(1, 1, 8)),
        (ops.rotate, noise(2, 8, 3).transpose(1, 2), noise(2, 1, 8), noise(2, 1, 8)),
        (ops.gated, "silu", noise(3, 5)),
        (ops.embed, tokens.int(), square),
        (ops.angles, tokens.float(), noise(4), 1.0, torch.float32),
    ]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match=r"float32|bfloat16|int32"):
            function(*arguments)
