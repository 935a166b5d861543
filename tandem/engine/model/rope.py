"""Rotary position embeddings (RoFormer: Su et al. 2021, arXiv:2104.09864) and their context extensions."""

from __future__ import annotations

import math

import torch

from tandem.engine.kernels.ops import Ops
from tandem.engine.model.rope_config import RopeConfig

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and signed sines, as `RotaryEmbedding.angles` gives them."""


class RotaryEmbedding:
    """Angles for positions; the pairs that turn together are (i, i + rotary_dim / 2), as in HF checkpoints."""

    def __init__(self, config: RopeConfig, max_positions: int, device: torch.device, ops: Ops) -> None:
        self.config = config
        self.max_positions = max_positions
        frequencies, self.scaling = inverse_frequencies(config)
        self.frequencies = frequencies.to(device)
        self._ops = ops

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> Angles:
        """Cosines and signed sines `[tokens, 1, rotary_dim]` in `dtype` for `positions` `[tokens]`; float32 inside.

        The sines of the first half are negative, as `Ops.rotate` needs them.
        """
        return self._ops.angles(positions, self._frequencies_at(positions), self.scaling, dtype)

    def _frequencies_at(self, positions: torch.Tensor) -> torch.Tensor:
        """`[rotary_dim / 2]`, or `[tokens, rotary_dim / 2]` where dynamic NTK has begun to stretch.

        Dynamic NTK makes the base a function of the sequence's length. Here it is the length up to the token itself,
        which is what a step-by-step decode has: a token's key then depends on its prefix alone and may be cached.
        """
        if self.config.kind != "dynamic":
            return self.frequencies
        factor, dim = self.config.factor, self.config.rotary_dim
        length = (positions + 1).clamp(min=self.max_positions).double()
        stretch = (factor * length / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        return 1.0 / ((self.config.theta * stretch).float()[:, None] ** exponents)


def turn(ops: Ops, heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotates the first `rotary_dim` elements of `[tokens, heads, head_dim]`; the others pass."""
    rotary_dim = angles[0].shape[-1]
    if rotary_dim == heads.shape[-1]:
        return ops.rotate(heads, *angles)
    return torch.cat((ops.rotate(heads[..., :rotary_dim], *angles), heads[..., rotary_dim:]), dim=-1)


def inverse_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """`[rotary_dim / 2]` radians per position, float32, and the factor on cosines and sines."""
    dim = config.rotary_dim
    powers = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "linear":
        return (1.0 / powers) / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, 1.0 / powers), 1.0
    if config.kind == "yarn":
        return _yarn(config, powers), _yarn_scaling(config)
    if config.kind == "longrope":
        return 1.0 / (torch.tensor(config.stretch, dtype=torch.float32) * powers), _longrope_scaling(config)
    return 1.0 / powers, 1.0


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, the ones between interpolated."""
    turns = config.original_positions * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / config.factor + blend * frequencies


def _yarn(config: RopeConfig, powers: torch.Tensor) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): stretched between the dimensions of `beta_fast` and `beta_slow`."""
    dim = config.rotary_dim

    def dimension(turns: float) -> float:
        return dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
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


def _longrope_scaling(config: RopeConfig) -> float:
    """LongRoPE's attention temperature (Ding et al. 2024, arXiv:2402.13753), on cosines and sines of both sides.

    LongRoPE has divisors for sequences within the context of the pre-training and others for longer ones. A key in the
    prefix cache must not depend on how long its sequence will become, so one set serves all sequences of a model: the
    long one where the model's context is longer than that of its pre-training (`rope_config`).
    """
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(config.factor) / math.log(config.original_positions))
