"""Which kernels a worker computes with, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from tandem.config import cache_folder
from tandem.engine.attention.base import AttentionBackend
from tandem.engine.attention.native import NativeAttention
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kernels.build import KernelsUnavailable, build_library, find_compiler
from tandem.engine.kernels.choose_gpu import GPU_KERNELS, UNMEASURED, StepReplay, load_gpu_kernels, replay_graphs
from tandem.engine.kernels.native import NativeLibrary
from tandem.engine.kernels.native_ops import FEW_ROWS, NativeOps
from tandem.engine.kernels.ops import Ops, TorchOps
from tandem.engine.kernels.replay import Forward, Replay
from tandem.engine.kv_pool import KvPool
from tandem.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """One set of kernels that belong together."""

    name: Literal["native", "torch", "triton", "flashinfer"]
    detail: str
    """What the native ones use of this processor, or why no others are used."""
    ops: Ops
    library: NativeLibrary | None = None
    backend: Callable[[KvPool], AttentionBackend] = TorchPagedAttention
    graph_rows: int = 0
    """Rows of the largest decode step that is captured as a CUDA graph; 0 captures none."""

    def attention(self, pool: KvPool) -> AttentionBackend:
        """The backend over a pool. Raises ValueError or ConfigError when it cannot serve the pool's layout."""
        return self.backend(pool)

    def replay(
        self, forward: Forward, attention: AttentionBackend, dtype: torch.dtype, layers: tuple[int, ...]
    ) -> StepReplay | None:
        """What records and replays decode steps of a model in `dtype`, where that can be done.

        layers: those whose hidden states are read along.
        """
        if self.graph_rows:
            return replay_graphs(forward, attention, self.graph_rows, layers)
        return None if self.library is None else Replay(forward, self.library, FEW_ROWS[dtype], layers)


def choose_kernels(
    wanted: Literal["auto", "native", "torch", "triton", "flashinfer"], device: torch.device, graph_rows: int = 0
) -> Kernels:
    """The native kernels on CPUs, unless they are unwanted or cannot be had; then torch, with a warning.

    On a GPU torch, unless others are wanted: these have not been measured. graph_rows: see `Kernels`. Raises
    ConfigError when what is wanted cannot be had. Uses so many threads as torch does at this moment.
    """
    if graph_rows and (wanted != "triton" or device.type != "cuda"):
        raise ConfigError(f"cuda_graphs needs kernels triton on a GPU; got {wanted} on {device}", "cuda_graphs")
    if wanted == "torch":
        return Kernels("torch", "as configured", TorchOps())
    if wanted in ("triton", "flashinfer"):
        ops, backend = load_gpu_kernels(wanted, device)
        log.warning("kernels %s: %s", wanted, UNMEASURED)
        return Kernels(wanted, UNMEASURED, ops, backend=backend, graph_rows=graph_rows)
    if wanted == "auto" and device.type == "cuda":
        return Kernels(
            "torch", f"those for GPUs must be asked for ({', '.join(GPU_KERNELS)}); {UNMEASURED}", TorchOps()
        )
    try:
        library = _library(device)
    except KernelsUnavailable as reason:
        if wanted == "native":
            raise ConfigError(f"kernels is native; {reason}", "kernels") from None
        if device.type == "cpu":
            log.warning("decoding will be slow: plain PyTorch is used in place of the native CPU kernels: %s", reason)
        return Kernels("torch", str(reason), TorchOps())
    log.info("native CPU kernels: %s, threads: %d", library.features, library.threads)
    return Kernels("native", library.features, NativeOps(library), library, partial(NativeAttention, library=library))


def _library(device: torch.device) -> NativeLibrary:
    if device.type != "cpu":
        raise KernelsUnavailable(f"they are for CPUs, and the device is {device}")
    try:
        cache = cache_folder()
    except RuntimeError as error:  # a user without a home, as containers have
        raise KernelsUnavailable(f"there is no folder to keep them in ({error}); set XDG_CACHE_HOME") from None
    path = build_library(find_compiler(), cache)
    try:
        return NativeLibrary(path, torch.get_num_threads())
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from None
