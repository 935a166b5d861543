"""How much memory KV pages get where nobody says: a fixed amount on CPUs, what a GPU has left on GPUs."""

from __future__ import annotations

import torch

from tandem.config import WorkerConfig
from tandem.device import DeviceMemory, device_memory
from tandem.engine.model.config import ModelConfig
from tandem.engine.runner import LOGIT_ROWS
from tandem.errors import ConfigError

MIB = 1 << 20
CPU_MIB = 256.0
RESERVED_SHARE = 0.1
"""Of a GPU's memory: the driver's context, libraries' workspaces, compiled kernels, fragments between allocations."""
LOGIT_BYTES = 32
"""For each logit that is sampled from: itself in float32, what penalties, filters and the draw make of it."""


def kv_mib(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    """`kv_mib`, or its default. The weights must be loaded: a GPU's free memory is measured here.

    Raises ConfigError when a GPU has nothing left.
    """
    if config.kv_mib is not None:
        return config.kv_mib
    if device.type == "cpu":
        return CPU_MIB
    return spare_bytes(device_memory(device), step_bytes(config, model, dtype)) / MIB


def spare_bytes(memory: DeviceMemory, step: int) -> int:
    """What is free, less a step's own memory and a reserve. Raises ConfigError when that is nothing."""
    reserved = int(memory.total * RESERVED_SHARE)
    spare = memory.free - step - reserved
    if spare <= 0:
        raise ConfigError(
            f"kv_mib is not set, and the GPU has no memory left for KV: of {memory.total / MIB:.0f} MiB "
            f"{memory.free / MIB:.0f} are free, {step / MIB:.0f} are for a step and {reserved / MIB:.0f} in reserve",
            "kv_mib",
        )
    return spare


def step_bytes(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """The most that the tensors of one step take at once: one layer's, for every token, and the logits of all rows.

    Layers run one after another, so that their number does not matter. Computed from shapes, not measured.
    """
    stream = 3 * model.hidden_size  # the residual, its norm, what is added to it
    heads = 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + model.num_heads * model.head_dim
    network = 3 * model.intermediate_size
    tokens = config.max_batch_tokens * (stream + max(heads, network)) * dtype.itemsize
    return tokens + max(config.max_running, LOGIT_ROWS) * model.vocab_size * LOGIT_BYTES
