"""`Ops` by compiled kernels. What C++ would take on trust is checked here before a call: dtypes, shapes, strides."""

from __future__ import annotations

import torch

from tandem.engine.kernels.native import NativeLibrary, real
from tandem.engine.kernels.ops import Activation, TorchOps

SHARED_WORK = 1 << 16
"""Elements from which an operation between the products is spread over threads, and gives up Python's lock."""
SHARED_WEIGHTS = 1 << 16
"""The same for the elements of a weight matrix."""
FEW_ROWS = {torch.bfloat16: 32, torch.float32: 16}
"""Rows up to which the native product is as fast as oneDNN's or faster; measured, see docs/log.md of 2026-11-21."""

_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class NativeOps:
    """See `Ops`. For tensors in this process's memory, of bfloat16 or float32."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._call, self._empty = library.call, library.empty
        self._threads = library.threads
        self._torch = TorchOps()
        self._rms_norm = library.kernels("rms_norm")
        self._rotate, self._gated = library.kernels("rotate"), library.kernels("gated")
        self._linear, self._embed = library.kernels("linear"), library.kernels("embed")
        self._angles = library.kernels("angles")

    def _threads_for(self, elements: int) -> int:
        return self._threads if elements >= SHARED_WORK else 1

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`."""
        x, outer, inner = _rows(x)
        _check_norm(x, weight)
        out = self._empty(x.shape, x.dtype)
        self._call(
            self._rms_norm[x.dtype], (x, weight), x.data_ptr(), weight.data_ptr(), out.data_ptr(),
            outer[0], inner[0], x.shape[-1], outer[1], inner[1], real(eps), self._threads_for(out.numel()),
            long=out.numel() >= SHARED_WORK,
        )  # fmt: skip
        return out

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        tokens, count, size = heads.shape
        for angles in (cos, sin):
            if angles.dtype is not heads.dtype or angles.shape != (tokens, 1, size) or not angles.is_contiguous():
                raise ValueError(f"the angles of heads {_about(heads)} are {_about(angles)}")
        strides = heads.stride()
        if strides[2] != 1 or size % 2:
            raise ValueError(f"heads {_about(heads)} of strides {strides} cannot be rotated")
        out = self._empty(heads.shape, heads.dtype)
        self._call(
            self._rotate[heads.dtype], (heads, cos, sin), heads.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            out.data_ptr(), tokens, count, size, strides[0], strides[1], self._threads_for(out.numel()),
            long=out.numel() >= SHARED_WORK,
        )  # fmt: skip
        return out

    def gated(self, activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        rows, width = gate_up.shape
        if width % 2 or gate_up.stride(1) != 1:
            raise ValueError(f"gate and up {_about(gate_up)} of strides {gate_up.stride()} cannot be halved")
        out = self._empty((rows, width // 2), gate_up.dtype)
        self._call(
            self._gated[gate_up.dtype], (gate_up,), _ACTIVATIONS[activation], gate_up.data_ptr(), out.data_ptr(),
            rows, width // 2, gate_up.stride(0), self._threads_for(out.numel()),
            long=out.numel() >= SHARED_WORK,
        )  # fmt: skip
        return out

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Ops`. Many rows are torch's: oneDNN reaches nine tenths of the processor's rate there."""
        (rows, inputs), (outputs, expected), dtype = x.shape, weight.shape, x.dtype
        if rows > FEW_ROWS[dtype]:
            return self._torch.linear(x, weight, bias, residual, wide)
        if inputs != expected or weight.dtype is not dtype or not weight.is_contiguous():
            raise ValueError(f"{_about(x)} cannot be multiplied by {_about(weight)}")
        if bias is not None and (bias.dtype is not dtype or bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"the bias of {outputs} outputs in {dtype} is {_about(bias)}")
        if residual is not None:
            if residual.dtype is not dtype or residual.shape != (rows, outputs):
                raise ValueError(f"{_about(residual)} cannot be added to {rows} rows of {outputs} outputs in {dtype}")
            residual = residual if residual.stride(1) == 1 else residual.contiguous()
        x = x if x.stride(1) == 1 else x.contiguous()
        out = self._empty((rows, outputs), torch.float32 if wide else dtype)
        self._call(
            self._linear[dtype], (x, weight, bias, residual), x.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), out.data_ptr(),
            rows, inputs, outputs, x.stride(0), 0 if residual is None else residual.stride(0), wide,
            self._threads if inputs * outputs >= SHARED_WEIGHTS else 1, long=inputs * outputs >= SHARED_WEIGHTS,
        )  # fmt: skip
        return out

    def embed(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See `Ops`. A token that the table has not becomes NaN, which ends its sequence with an error."""
        (count,), (rows, size) = tokens.shape, table.shape
        if tokens.dtype is not torch.int64 or not tokens.is_contiguous() or not table.is_contiguous():
            raise ValueError(f"tokens {_about(tokens)} cannot be looked up in {_about(table)}")
        out = self._empty((count, size), table.dtype)
        self._call(
            self._embed[table.dtype], (tokens, table),
            tokens.data_ptr(), table.data_ptr(), out.data_ptr(), count, rows, size,
        )  # fmt: skip
        return out

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        if frequencies.dim() != 1 or positions.numel() > FEW_ROWS[dtype]:
            return self._torch.angles(positions, frequencies, scaling, dtype)
        (count,), (half,) = positions.shape, frequencies.shape
        if positions.dtype is not torch.int64 or frequencies.dtype is not torch.float32:
            raise ValueError(f"positions {_about(positions)} have no angles at frequencies {_about(frequencies)}")
        positions, frequencies = positions.contiguous(), frequencies.contiguous()
        cos, sin = (self._empty((count, 1, 2 * half), dtype) for _ in range(2))
        self._call(
            self._angles[dtype], (positions, frequencies), positions.data_ptr(), frequencies.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), count, half, real(scaling),
        )  # fmt: skip
        return cos, sin


Stride = tuple[int, int]


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, Stride, Stride]:
    """The tensor with its last dimension dense, and length and stride of the two dimensions before it."""
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x, (x.shape[0], x.stride(0)), (1, 0)
    if x.dim() == 3:
        return x, (x.shape[0], x.stride(0)), (x.shape[1], x.stride(1))
    return x, (x.numel() // x.shape[-1], x.shape[-1]), (1, 0)


def _check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.dtype is not x.dtype or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"the weight of a norm of {_about(x)} is {_about(weight)}")


def _about(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
