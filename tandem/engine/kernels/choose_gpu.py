"""Kernels for GPUs: which there are, what each needs, and that none of them has been measured."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from tandem.device import CudaCapture
from tandem.engine.attention.base import AttentionBackend, AttentionPlan, IntArray
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels.ops import Ops
from tandem.engine.kernels.replay import Forward, Replayed
from tandem.engine.kv_pool import KvPool
from tandem.errors import ConfigError

GpuKernels = Literal["triton", "flashinfer"]
GPU_KERNELS: tuple[GpuKernels, ...] = ("triton", "flashinfer")
UNMEASURED = "unmeasured: no GPU has run them yet"
"""Holds for all of them until a row of the table in docs/performance.md says otherwise."""

Loaded = tuple[Ops, Callable[[KvPool], AttentionBackend]]


class StepReplay(Protocol):
    """What runs decode steps that were recorded."""

    drafts: bool
    """Whether a row may have several tokens: its own and a draft's."""

    def run(self, tokens: InputTokens, positions: IntArray, plan: AttentionPlan) -> Replayed | None:
        """A step that `plan` was made for. None when it has to be computed in the usual way."""


def installed_gpu_kernels() -> list[GpuKernels]:
    """Those whose library is installed; `flashinfer` is for attention alone and computes the rest with Triton."""
    return [name for name in GPU_KERNELS if importlib.util.find_spec(name) and importlib.util.find_spec("triton")]


def load_gpu_kernels(wanted: GpuKernels, device: torch.device) -> Loaded:
    """Operations, and the backend for a pool.

    Raises ConfigError when the library is missing, or the device is no GPU (Triton's interpreter will do as one).
    """
    if wanted not in installed_gpu_kernels():
        missing = " and ".join(name for name in {wanted, "triton"} if not importlib.util.find_spec(name))
        raise ConfigError(f"kernels is {wanted}; {missing} is not installed", "kernels")
    if device.type != "cuda" and not (wanted == "triton" and _interpreted()):
        raise ConfigError(f"kernels is {wanted}; they are for GPUs, and the device is {device}", "kernels")
    # Imported here: a worker on a CPU does without these libraries.
    from tandem.engine.attention.flashinfer import FlashInferAttention, load_flashinfer
    from tandem.engine.attention.triton_paged import TritonPagedAttention
    from tandem.engine.kernels.triton_ops import TritonOps

    if wanted == "triton":
        return TritonOps(), TritonPagedAttention
    library = load_flashinfer()
    return TritonOps(), lambda pool: FlashInferAttention(pool, library)


def replay_graphs(
    forward: Forward, attention: AttentionBackend, rows: int, layers: tuple[int, ...]
) -> StepReplay | None:
    """Decode steps of up to `rows` rows as CUDA graphs; None where the backend is not Triton's."""
    from tandem.engine.attention.triton_paged import TritonPagedAttention
    from tandem.engine.graphs import GraphReplay

    if not isinstance(attention, TritonPagedAttention):
        return None
    return GraphReplay(forward, attention, CudaCapture(attention.pool.device), rows, layers)


def _interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
