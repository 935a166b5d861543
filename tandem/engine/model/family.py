"""What a model family gives the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model.config import Fields, ModelConfig
from tandem.engine.model.layers import Place, Tensors
from tandem.kv import KvLayout


class CausalLM(Protocol):
    """A loaded decoder. All token dimensions are flat: the rows of a batch lie one after another."""

    layout: KvLayout

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """`[tokens]`, `[tokens]` (int64) -> `[tokens, hidden]` before the last norm; KV goes to the pool."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, vocabulary]`, float32, for the rows that need them."""

    def tensors(self) -> Tensors:
        """Every tensor the checkpoint must hold, and the memory it goes into."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture name of `config.json`, and how to read and build it."""

    architecture: str
    parse: Callable[[Fields], ModelConfig]
    build: Callable[[ModelConfig, Place], CausalLM]
