"""Norms of queries and keys before their rotation (Henry et al. 2020, arXiv:2010.04245, in RMS form)."""

from __future__ import annotations

from typing import Protocol

import torch

from tandem.engine.model.config import ModelConfig
from tandem.engine.model.layers import Place, Tensors, make_norm


class QkNorm(Protocol):
    """Acts on the heads of queries and keys, which lie one after another."""

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads + kv_heads, head_dim]`, the same shape back."""

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""


class NoQkNorm:
    """For families that have none."""

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """See `QkNorm`."""
        return heads

    def tensors(self, prefix: str) -> Tensors:
        """See `QkNorm`."""
        return {}


class SplitQkNorm:
    """One norm for queries and one for keys, over each head or over all heads of a token together."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        self.heads = config.num_heads
        self.whole = config.qk_norm == "whole"
        query = config.num_heads * config.head_dim if self.whole else config.head_dim
        keys = config.num_kv_heads * config.head_dim if self.whole else config.head_dim
        self.query, self.key = make_norm(query, config.norm, place), make_norm(keys, config.norm, place)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """See `QkNorm`."""
        query, key = heads[:, : self.heads], heads[:, self.heads :]
        if self.whole:
            normed = self.query(query.flatten(1)), self.key(key.flatten(1))
            return torch.cat(normed, dim=1).view(heads.shape)
        return torch.cat((self.query(query), self.key(key)), dim=1)

    def tensors(self, prefix: str) -> Tensors:
        """See `QkNorm`."""
        return {f"{prefix}q_norm.weight": self.query.weight, f"{prefix}k_norm.weight": self.key.weight}


def make_qk_norm(config: ModelConfig, place: Place) -> QkNorm:
    """As `config.qk_norm` says."""
    return NoQkNorm() if config.qk_norm == "none" else SplitQkNorm(config, place)
