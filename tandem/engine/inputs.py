"""The input tokens of a step: those that are known, and future ones, which never leave the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.device import upload


@dataclass(frozen=True, slots=True)
class InputTokens:
    """Of all rows, one after another."""

    known: Sequence[int]
    """A 0 stands in the place of a future one."""
    sampled: torch.Tensor | None = None
    """What the step in flight draws, int64, on the device."""
    moves: Sequence[tuple[int, int]] = ()
    """Of each future token, where it is among those, and its place among `known`."""

    def __len__(self) -> int:
        return len(self.known)

    def on(self, device: torch.device) -> torch.Tensor:
        """`[tokens]`, int64."""
        tokens = upload(torch.from_numpy(np.array(self.known, dtype=np.int64)), device)
        self.fill(tokens)
        return tokens

    def fill(self, tokens: torch.Tensor) -> None:
        """Copies the future ones to their places among `tokens`, which has the known ones."""
        if self.sampled is not None and self.moves:
            sources, targets = upload(torch.tensor(self.moves).T.contiguous(), tokens.device)
            tokens[targets] = self.sampled[sources]
