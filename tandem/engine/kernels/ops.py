"""What a model asks for beside attention, and the plain torch form of it that every other form must equal."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh"]


class Ops(Protocol):
    """Stateless; tensors lie on one device. Results are fresh tensors unless the method says otherwise."""

    def embed(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`[tokens]`, int64, `-> [tokens, size]`: rows of the table `[vocabulary, size]`."""

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines `[tokens, 1, 2 * half]` of `positions` `[tokens]`; float32 inside.

        frequencies: radians per position, float32, `[half]` or `[tokens, half]`. The sines of the first half are
        negative, as `rotate` needs them; both are multiplied by `scaling`.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`[..., size] -> [..., size]` in the dtype of `x`; float32 inside."""

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates `[tokens, heads, head_dim]` (last dimension dense) by `[tokens, 1, head_dim]` cosines and sines.

        The pairs are (i, i + head_dim / 2); the sines of the first half are negative, as `RotaryEmbedding` gives them.
        """

    def gated(self, activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """`[tokens, 2 * inner] -> [tokens, inner]`: the activation of the first half times the second half."""

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        wide: bool = False,
    ) -> torch.Tensor:
        """`[tokens, inputs] -> [tokens, outputs]`: `x weight^T + bias`, and `residual` added to that.

        weight: `[outputs, inputs]`, dense, as checkpoints have it. residual: `[tokens, outputs]`. wide: the result is
        float32 (logits).
        """


class TorchOps:
    """The reference, on every device."""

    def embed(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        return functional.embedding(tokens, table)

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        phase = (positions[:, None].float() * frequencies)[:, None]
        cos, sin = (phase.cos() * scaling).to(dtype), (phase.sin() * scaling).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Ops`. Zhang and Sennrich 2019, arXiv:1910.07467."""
        return torch.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)

    def gated(self, activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Ops`. Shazeer 2020, arXiv:2002.05202."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Ops`."""
        out = functional.linear(x, weight, bias)
        out = out if residual is None else residual + out
        return out.float() if wide else out
