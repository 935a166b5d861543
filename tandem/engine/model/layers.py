"""The layers that decoder families are made of. Weights are plain tensors; `tensors()` names them as checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from tandem.engine.kernels.ops import Ops, TorchOps
from tandem.engine.model.config import NormConfig

Tensors = dict[str, torch.Tensor]
"""Checkpoint name -> the memory that the loader copies this tensor into."""


@dataclass(frozen=True, slots=True)
class Place:
    """What weights are made of and where they lie."""

    dtype: torch.dtype
    device: torch.device
    ops: Ops = field(default_factory=TorchOps)
    """What computes the operations between the matrix products."""

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised memory that the loader fills."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class LinearMethod(Protocol):
    """How one linear layer keeps and applies its weights: the seam for quantisation."""

    def create(self, inputs: int, outputs: int, bias: bool, place: Place) -> Mapping[str, torch.Tensor]:
        """Tensors by suffix ("weight", "bias"); the first dimension is `outputs`, so that merged parts are slices."""

    def apply(
        self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """`[tokens, inputs] -> [tokens, outputs]`, added to `residual` if that is given."""


class Unquantised:
    """Weights in the model's own dtype."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def create(self, inputs: int, outputs: int, bias: bool, place: Place) -> Mapping[str, torch.Tensor]:
        """See `LinearMethod`."""
        weight = {"weight": place.empty(outputs, inputs)}
        return weight | {"bias": place.empty(outputs)} if bias else weight

    def apply(
        self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearMethod`."""
        return self._ops.linear(x, tensors["weight"], tensors.get("bias"), residual)


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint layer inside a merged one."""

    name: str
    outputs: int


class Linear:
    """`y = x W^T + b`, one or several checkpoint layers merged along their outputs (q, k, v or gate, up)."""

    def __init__(self, parts: Sequence[Part], inputs: int, bias: bool, place: Place, method: LinearMethod) -> None:
        self.parts = tuple(parts)
        self.method = method
        self._tensors = method.create(inputs, sum(part.outputs for part in parts), bias, place)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`[tokens, inputs] -> [tokens, sum of the parts' outputs]`, added to `residual` if that is given."""
        return self.method.apply(self._tensors, x, residual)

    def tensors(self, prefix: str) -> Tensors:
        """Each part's slice of the merged tensors, under its own name."""
        named, offset = {}, 0
        for part in self.parts:
            for suffix, tensor in self._tensors.items():
                named[f"{prefix}{part.name}.{suffix}"] = tensor[offset : offset + part.outputs]
            offset += part.outputs
        return named


class Norm(Protocol):
    """A norm of the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype back."""


class NoNorm:
    """Gives back what it gets."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Norm`."""
        return x


class RMSNorm:
    """Root mean square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, place: Place) -> None:
        self.weight = place.empty(size)
        self.eps = eps
        self._ops = place.ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension; float32 inside."""
        return self._ops.rms_norm(x, self.weight, self.eps)


class WideRMSNorm:
    """RMSNorm whose weight, plus an offset, multiplies in float32, before the result is rounded to the dtype of `x`."""

    def __init__(self, size: int, config: NormConfig, place: Place) -> None:
        self.weight = torch.empty(size, dtype=torch.float32, device=place.device)
        self.config = config
        self._ops = place.ops

    @cached_property
    def effective(self) -> torch.Tensor:
        """What multiplies; computed at the first use, when the weight is loaded."""
        return self.weight + self.config.offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Norm`."""
        return self._ops.rms_norm(x.float(), self.effective, self.config.eps).to(x.dtype)


def make_norm(size: int, config: NormConfig, place: Place) -> RMSNorm | WideRMSNorm:
    """The norm that the model's configuration asks for."""
    return WideRMSNorm(size, config, place) if config.wide else RMSNorm(size, config.eps, place)


class Embedding:
    """Token embeddings `[vocabulary, hidden]`, which may also serve as the output layer."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Place) -> None:
        self.weight = place.empty(vocab_size, hidden_size)
        self._ops = place.ops

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[tokens] -> [tokens, hidden]`"""
        return self._ops.embed(tokens, self.weight)
