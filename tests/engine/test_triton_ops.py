"""Triton's kernels between the products, in Triton's interpreter, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from tandem.engine.kernels.ops import Activation, Ops, TorchOps

triton_ops = pytest.importorskip("tandem.engine.kernels.triton_ops", reason="triton is not installed")
# Where an exponential overflows, its reciprocal is the 0 that is meant; numpy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
# The interpreter cuts float32 to bfloat16 where a GPU rounds: one step of 2^-7 instead of half a one.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EXACT = TorchOps()


@pytest.fixture(scope="module")
def ops() -> Ops:
    made: Ops = triton_ops.TritonOps()
    return made


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(1.7).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 24), (1, 1), (7, 300), (3, 2, 40), (2, 3, 2, 16)])
def test_norms(ops: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = noise(*shape, dtype=dtype), noise(shape[-1], dtype=dtype, seed=2)
    before = x.clone()
    assert_close(ops.rms_norm(x, weight, 1e-5), EXACT.rms_norm(x.double(), weight.double(), 1e-5), dtype)
    assert torch.equal(x, before)


def test_norms_of_slices_and_other_weights(ops: Ops) -> None:
    whole, weight = noise(6, 9, 32), noise(16, seed=3)
    for part in (whole[:, 2:5, 16:], whole[1:, 4, :16], whole.transpose(0, 2)[:16].transpose(0, 2)):
        assert_close(ops.rms_norm(part, weight, 1e-6), EXACT.rms_norm(part.double(), weight.double(), 1e-6), part.dtype)
    half = noise(4, 16, dtype=torch.bfloat16)
    assert_close(ops.rms_norm(half, weight, 0.1), EXACT.rms_norm(half.double(), weight.double(), 0.1), half.dtype)
    with pytest.raises(ValueError, match="the weight of a norm"):
        ops.rms_norm(whole, weight, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [2, 24, 64])
def test_rotations(ops: Ops, size: int, dtype: torch.dtype) -> None:
    whole = noise(5, 6, size + 3, dtype=dtype)
    heads, (cos, sin) = whole[:, 1:5, 3:], noise(2, 5, 1, size, dtype=dtype, seed=1)
    expected = EXACT.rotate(heads.double(), cos.double(), sin.double())
    assert_close(ops.rotate(heads, cos, sin), expected, dtype)
    with pytest.raises(ValueError, match="cannot be rotated"):
        ops.rotate(heads.transpose(0, 2), cos, sin)
    with pytest.raises(ValueError, match="angles of"):
        ops.rotate(heads[:4], cos, sin)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(ops: Ops, activation: Activation, dtype: torch.dtype) -> None:
    for inner in (8, 1030):
        gate_up = noise(3, 2 * inner + 5, dtype=dtype)[:, 5:]
        gate_up[0, :3] = torch.tensor([-30.0, 30.0, 0.0])
        assert_close(ops.gated(activation, gate_up), EXACT.gated(activation, gate_up.double()), dtype)
    with pytest.raises(ValueError, match="cannot be halved"):
        ops.gated(activation, gate_up[:, 1:])
