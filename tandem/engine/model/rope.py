"""Rotary position embeddings (RoFormer: Su et al. 2021, arXiv:2104.09864) and their context extensions."""

from __future__ import annotations

import math

import torch

from tandem.engine.model.config import RopeConfig


class RotaryEmbedding:
    """Angles for positions; the pairs that turn together are (i, i + head_dim / 2), as in HF checkpoints."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device) -> None:
        self.config = config
        self.head_dim = head_dim
        self.max_positions = max_positions
        frequencies, self.scaling = inverse_frequencies(config, head_dim)
        self.frequencies = frequencies.to(device)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines `[tokens, 1, head_dim]` in `dtype` for `positions` `[tokens]`; float32 inside.

        The sines of the first half are negative, as `Ops.rotate` needs them.
        """
        phase = (positions[:, None].float() * self._frequencies_at(positions))[:, None]
        cos, sin = (phase.cos() * self.scaling).to(dtype), (phase.sin() * self.scaling).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _frequencies_at(self, positions: torch.Tensor) -> torch.Tensor:
        """`[head_dim / 2]`, or `[tokens, head_dim / 2]` where dynamic NTK has begun to stretch.

        Dynamic NTK makes the base a function of the sequence's length. Here it is the length up to the token itself,
        which is what a step-by-step decode has: a token's key then depends on its prefix alone and may be cached.
        """
        if self.config.kind != "dynamic":
            return self.frequencies
        factor, dim = self.config.factor, self.head_dim
        length = (positions + 1).clamp(min=self.max_positions).double()
        stretch = (factor * length / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        return 1.0 / ((self.config.theta * stretch).float()[:, None] ** exponents)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """`[head_dim / 2]` radians per position, float32, and the factor on cosines and sines."""
    powers = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.kind == "linear":
        return (1.0 / powers) / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, 1.0 / powers), 1.0
    if config.kind == "yarn":
        return _yarn(config, powers, head_dim), _yarn_scaling(config)
    return 1.0 / powers, 1.0


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, the ones between interpolated."""
    turns = config.original_positions * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / config.factor + blend * frequencies


def _yarn(config: RopeConfig, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): stretched between the dimensions of `beta_fast` and `beta_slow`."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return ramp / (config.factor * powers) + (1.0 - ramp) / powers


def _yarn_scaling(config: RopeConfig) -> float:
    """YaRN's attention temperature, applied to cosines and sines of both queries and keys."""

    def temperature(mscale: float) -> float:
        return 1.0 if config.factor <= 1.0 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)
