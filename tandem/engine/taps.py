"""Hidden states inside a model, for those who read along."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class HiddenTaps:
    """The residual stream after some layers, filled by one forward pass. It costs nothing but the memory."""

    layers: tuple[int, ...]
    """Indices, from 0 on; the last layer's is before the last norm."""
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """`[tokens, hidden]` by layer."""

    def take(self, layer: int, x: torch.Tensor) -> None:
        """Keeps what a layer gave, if it is wanted."""
        if layer in self.layers:
            self.states[layer] = x

    def joined(self) -> torch.Tensor:
        """`[tokens, len(layers) * hidden]`, side by side in the order of `layers`."""
        return torch.cat([self.states[layer] for layer in self.layers], dim=-1)
