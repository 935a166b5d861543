"""What a model family gives the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.decoder import Decoder
from tandem.engine.model.fields import Fields
from tandem.engine.model.layers import Place, Tensors
from tandem.engine.taps import HiddenTaps
from tandem.kv import KvLayout


class CausalLM(Protocol):
    """A loaded decoder. All token dimensions are flat: the rows of a batch lie one after another."""

    layout: KvLayout

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor | None = None,
        taps: HiddenTaps | None = None,
    ) -> torch.Tensor:
        """`[tokens]`, `[tokens]` (int64) -> `[kept tokens, hidden]` before the last norm; KV of all goes to the pool.

        keep: indices of the tokens whose result is wanted, which spares the last layer the others; None: all.
        taps: takes the hidden states of all tokens after some layers.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, vocabulary]`, float32, for the rows that need them."""

    def tensors(self) -> Tensors:
        """Every tensor the checkpoint must hold, and the memory it goes into."""


def same_name(name: str) -> str | None:
    """For families whose checkpoints hold nothing but the decoder, under its own names."""
    return name


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture name of `config.json`, and how to read and build it."""

    architecture: str
    parse: Callable[[Fields], ModelConfig]
    build: Callable[[ModelConfig, Place], CausalLM] = Decoder
    rename: Callable[[str], str | None] = same_name
    """From the name of a stored tensor to the decoder's; None for one that is no part of the decoder."""
