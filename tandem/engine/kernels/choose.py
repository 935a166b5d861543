"""Which kernels a worker computes with, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from tandem.config import cache_folder
from tandem.engine.attention.base import AttentionBackend
from tandem.engine.attention.native import NativeAttention
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kernels.build import KernelsUnavailable, build_library, find_compiler
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

    name: Literal["native", "torch"]
    detail: str
    """What the native ones use of this processor, or why they are not used."""
    ops: Ops
    library: NativeLibrary | None = None

    def attention(self, pool: KvPool) -> AttentionBackend:
        """The backend over a pool. Raises ValueError when it cannot serve the pool's layout."""
        return TorchPagedAttention(pool) if self.library is None else NativeAttention(pool, self.library)

    def replay(self, forward: Forward, dtype: torch.dtype) -> Replay | None:
        """What records and replays decode steps of a model in `dtype`, where that can be done."""
        return None if self.library is None else Replay(forward, self.library, FEW_ROWS[dtype])


def choose_kernels(wanted: Literal["auto", "native", "torch"], device: torch.device) -> Kernels:
    """The native kernels on CPUs, unless they are unwanted or cannot be had; then torch, with a warning.

    Raises ConfigError when `native` is wanted and cannot be had. Uses so many threads as torch does at this moment.
    """
    if wanted == "torch":
        return Kernels("torch", "as configured", TorchOps())
    try:
        library = _library(device)
    except KernelsUnavailable as reason:
        if wanted == "native":
            raise ConfigError(f"kernels is native; {reason}", "kernels") from None
        if device.type == "cpu":
            log.warning("decoding will be slow: plain PyTorch is used in place of the native CPU kernels: %s", reason)
        return Kernels("torch", str(reason), TorchOps())
    log.info("native CPU kernels: %s, threads: %d", library.features, library.threads)
    return Kernels("native", library.features, NativeOps(library), library)


def _library(device: torch.device) -> NativeLibrary:
    if device.type != "cpu":
        raise KernelsUnavailable(f"they are for CPUs, and the device is {device}")
    path = build_library(find_compiler(), cache_folder())
    try:
        return NativeLibrary(path, torch.get_num_threads())
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from None
