"""What a drafter with KV of its own computes with: a small model, or a head over the target's hidden states."""

from __future__ import annotations

from typing import Protocol

import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model import LoadedModel
from tandem.engine.model.draft_head import DraftHead
from tandem.kv import KvLayout


class DraftNet(Protocol):
    """Computes what may come next from tokens and, a head does, from features. See `DraftHead` for the words."""

    name: str
    layers: tuple[int, ...]
    """The target's layers that it reads; none: tokens alone."""
    layout: KvLayout
    """Its own KV."""
    lasting: bool
    """Whether the KV of a drafted token stays right once the token is accepted."""

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, len(layers) * hidden] -> [tokens, features]`."""

    def nothing(self, count: int) -> torch.Tensor:
        """`[count, features]` that stand for features which are not at hand."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the KV of these positions; the states of the kept ones, `[kept, hidden]`, which are features too."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, choices]`, float32."""

    def token_ids(self, choices: torch.Tensor) -> torch.Tensor:
        """Ids of the target's vocabulary, any shape."""


class HeadNet:
    """A draft head."""

    name = "head"
    lasting = False  # the head's own states stood in for the target's

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        self.layers = head.layers
        self.layout = head.layout
        self.fuse = head.fuse
        self.forward = head.forward
        self.logits = head.logits
        self.token_ids = head.token_ids

    def nothing(self, count: int) -> torch.Tensor:
        """See `DraftNet`."""
        weight = self._head.embedding.weight
        return weight.new_zeros(count, weight.shape[1])


class ModelNet:
    """A draft model: it needs nothing of the target but its tokens."""

    name = "model"
    layers: tuple[int, ...] = ()
    lasting = True

    def __init__(self, loaded: LoadedModel, vocab_size: int) -> None:
        """vocab_size: the target's; a model may have more rows than its tokeniser has tokens."""
        self._module = loaded.module
        self._device = loaded.device
        self._choices = min(vocab_size, loaded.config.vocab_size)
        self.layout = loaded.layout

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing is read."""
        return hidden[:, :0]

    def nothing(self, count: int) -> torch.Tensor:
        """See `DraftNet`."""
        return torch.empty(count, 0, device=self._device)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """See `DraftNet`."""
        return self._module.forward(tokens, positions, plan, keep)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """See `DraftNet`."""
        return self._module.logits(states)[:, : self._choices]

    def token_ids(self, choices: torch.Tensor) -> torch.Tensor:
        """See `DraftNet`."""
        return choices
