"""The compiled kernels: loading them, and `Ops` by them.

Everything that C++ would take on trust is checked here before a call: dtypes, shapes, strides. Quick kernels are called
with Python's lock held, since giving it up and getting it back can cost more than they do; slow ones without.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from tandem.engine.kernels.ops import Activation, TorchOps

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
SHARED_WORK = 1 << 16
"""Elements from which an operation between the products is spread over threads."""
SHARED_WEIGHTS = 1 << 16
"""The same for the elements of a weight matrix."""
FEW_ROWS = {torch.bfloat16: 32, torch.float32: 16}
"""Rows up to which the native product is faster than oneDNN's, by `benchmarks/engine.py`."""

_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_SIGNATURES: dict[str, Sequence[Any]] = {
    "linear": [c_void_p] * 5 + [c_int64] * 5 + [c_int] * 2,
    "rms_norm": [c_void_p] * 3 + [c_int64] * 5 + [c_float, c_int],
    "add_rms_norm": [c_void_p] * 5 + [c_int64] * 2 + [c_float, c_int],
    "rotate": [c_void_p] * 4 + [c_int64] * 5 + [c_int],
    "gated": [c_int, c_void_p, c_void_p] + [c_int64] * 3 + [c_int],
    "attend": [c_void_p] * 6 + [c_int64] * 6,
}
SLOW = ("linear", "attend")
Function = Any
"""A foreign function; ctypes has no narrower type for one."""


class NativeLibrary:
    """The loaded shared library. Raises OSError when it cannot be loaded."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self._quick, self._slow = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        self._slow.tandem_features.restype = ctypes.c_char_p
        self.features: str = self._slow.tandem_features().decode()
        self.threads = threads if self._slow.tandem_threads_supported() else 1

    def kernels(self, name: str) -> dict[torch.dtype, Function]:
        """The functions of one operation by dtype."""
        found = {}
        for dtype, suffix in SUFFIXES.items():
            function = getattr(self._slow if name in SLOW else self._quick, f"tandem_{name}_{suffix}")
            function.argtypes, function.restype = _SIGNATURES[name], None
            found[dtype] = function
        return found


class NativeOps:
    """See `Ops`. For tensors in this process's memory, of bfloat16 or float32."""

    def __init__(self, library: NativeLibrary) -> None:
        self._threads = library.threads
        self._torch = TorchOps()
        self._rms_norm, self._add_rms_norm = library.kernels("rms_norm"), library.kernels("add_rms_norm")
        self._rotate, self._gated = library.kernels("rotate"), library.kernels("gated")
        self._linear = library.kernels("linear")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`."""
        x, outer, inner = _rows(x)
        size, dtype = x.shape[-1], x.dtype
        if weight.dtype is not dtype or weight.shape != (size,) or not weight.is_contiguous():
            raise ValueError(f"the weight of a norm of {dtype} [..., {size}] is {weight.dtype} {tuple(weight.shape)}")
        out = torch.empty(x.shape, dtype=dtype)
        threads = self._threads if out.numel() >= SHARED_WORK else 1
        self._rms_norm[dtype](
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), outer[0], inner[0], size, outer[1], inner[1], eps, threads
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        size, dtype = x.shape[-1], x.dtype
        if weight.dtype is not dtype or weight.shape != (size,) or not weight.is_contiguous():
            raise ValueError(f"the weight of a norm of {dtype} [..., {size}] is {weight.dtype} {tuple(weight.shape)}")
        if y.dtype is not dtype or y.shape != x.shape:
            raise ValueError(f"{y.dtype} {tuple(y.shape)} is added to {dtype} {tuple(x.shape)}")
        x, y = x.contiguous(), y.contiguous()
        total, out = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=dtype)
        threads = self._threads if out.numel() >= SHARED_WORK else 1
        self._add_rms_norm[dtype](
            x.data_ptr(), y.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
            x.numel() // size, size, eps, threads,
        )  # fmt: skip
        return total, out

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        tokens, count, size = heads.shape
        dtype = heads.dtype
        for angles in (cos, sin):
            if angles.dtype is not dtype or angles.shape != (tokens, 1, size) or not angles.is_contiguous():
                raise ValueError(f"angles of {dtype} {tuple(heads.shape)} are {angles.dtype} {tuple(angles.shape)}")
        if heads.stride(2) != 1 or size % 2:
            raise ValueError(f"heads {tuple(heads.shape)} of strides {heads.stride()} cannot be rotated")
        out = torch.empty(heads.shape, dtype=dtype)
        threads = self._threads if out.numel() >= SHARED_WORK else 1
        self._rotate[dtype](
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            tokens, count, size, heads.stride(0), heads.stride(1), threads,
        )  # fmt: skip
        return out

    def gated(self, activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        rows, width = gate_up.shape
        if width % 2 or gate_up.stride(1) != 1:
            raise ValueError(f"gate and up {tuple(gate_up.shape)} of strides {gate_up.stride()} cannot be halved")
        out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
        threads = self._threads if out.numel() >= SHARED_WORK else 1
        self._gated[gate_up.dtype](
            _ACTIVATIONS[activation], gate_up.data_ptr(), out.data_ptr(), rows, width // 2, gate_up.stride(0), threads
        )
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
        rows, dtype = x.shape[0], x.dtype
        if rows > FEW_ROWS[dtype]:
            return self._torch.linear(x, weight, bias, residual, wide)
        outputs, inputs = weight.shape
        if x.shape[1] != inputs or weight.dtype is not dtype or not weight.is_contiguous():
            raise ValueError(f"{dtype} {tuple(x.shape)} cannot be multiplied by {weight.dtype} {tuple(weight.shape)}")
        if bias is not None and (bias.dtype is not dtype or bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"the bias of {dtype} outputs [{outputs}] is {bias.dtype} {tuple(bias.shape)}")
        if residual is not None and (residual.dtype is not dtype or residual.shape != (rows, outputs)):
            raise ValueError(f"{residual.dtype} {tuple(residual.shape)} cannot be added to {dtype} [{rows}, {outputs}]")
        x = x if x.stride(1) == 1 else x.contiguous()
        if residual is not None and residual.stride(1) != 1:
            residual = residual.contiguous()
        out = torch.empty((rows, outputs), dtype=torch.float32 if wide else dtype)
        self._linear[dtype](
            x.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(), rows, inputs, outputs, x.stride(0),
            0 if residual is None else residual.stride(0),
            wide, self._threads if weight.numel() >= SHARED_WEIGHTS else 1,
        )  # fmt: skip
        return out


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
