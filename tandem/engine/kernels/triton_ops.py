"""`Ops` by Triton kernels: what is many small kernels in torch is one here.

Not measured: these kernels ran in Triton's interpreter and were compiled, but no GPU has run them yet.
"""

from __future__ import annotations

import torch

from tandem.device import on_device
from tandem.engine.kernels.gpu import elementwise
from tandem.engine.kernels.ops import Activation, TorchOps

GATED_BLOCK = 1024
"""Elements that one program of a gate computes."""


class TritonOps(TorchOps):
    """See `Ops`. For tensors of one GPU. Products, embeddings and a step's angles, one kernel or few, are torch's."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`."""
        shape, size = x.shape, x.shape[-1]
        if weight.shape != (size,) or not weight.is_contiguous():
            raise ValueError(f"the weight of a norm of [..., {size}] is {tuple(weight.shape)}")
        x = _rows(x)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        outer, inner = x.shape[:2]
        with on_device(x.device):
            elementwise.rms_norm[(outer * inner,)](
                x, weight, out, inner, x.stride(0), x.stride(1), eps, SIZE=size, BLOCK=_padded(size),
            )  # fmt: skip
        return out

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        tokens, count, size = heads.shape
        if heads.stride(2) != 1 or size % 2:
            raise ValueError(f"heads {tuple(heads.shape)} of strides {heads.stride()} cannot be rotated")
        if {cos.shape, sin.shape} != {(tokens, 1, size)} or not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError(f"angles of {tuple(heads.shape)} are {tuple(cos.shape)} and {tuple(sin.shape)}")
        out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        with on_device(heads.device):
            elementwise.rotate[(tokens, count)](
                heads, cos, sin, out, heads.stride(0), heads.stride(1), HEADS=count, SIZE=size, BLOCK=_padded(size)
            )
        return out

    def gated(self, activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        tokens, width = gate_up.shape
        if width % 2 or gate_up.stride(1) != 1:
            raise ValueError(f"gate and up {tuple(gate_up.shape)} of strides {gate_up.stride()} cannot be halved")
        size = width // 2
        block = min(GATED_BLOCK, _padded(size))
        out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
        with on_device(gate_up.device):
            elementwise.gated[(tokens, -(-size // block))](
                gate_up, out, gate_up.stride(0), SIZE=size, KIND=activation, BLOCK=block
            )
        return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`[outer, inner, size]`, last dimension dense; a copy only where the tensor is cut in more ways than that."""
    if x.dim() == 2:
        x = x[:, None]
    elif x.dim() != 3:
        x = x.reshape(1, -1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _padded(size: int) -> int:
    """The next power of two, which is what Triton's ranges must be."""
    return 1 << (size - 1).bit_length()
