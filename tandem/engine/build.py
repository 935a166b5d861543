"""From settings to an engine: loads the model and divides the memory into pages."""

from __future__ import annotations

import logging
from pathlib import Path

from tandem.config import WorkerConfig
from tandem.device import resolve_device
from tandem.engine.engine import Engine
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.policy import EngineConfig
from tandem.engine.runner import Runner
from tandem.errors import ConfigError
from tandem.kv import KvLayout

log = logging.getLogger(__name__)

MIB = 1 << 20


def build_engine(config: WorkerConfig) -> tuple[Engine, LoadedModel]:
    """Loads `config.model`, a folder, and makes an engine for it.

    Raises CheckpointError when the model cannot be served, ConfigError when a setting does not fit it or this machine.
    """
    device = resolve_device(config.device)
    model = load_model(Path(config.model), config.dtype, device, choose_kernels(config.kernels, device))
    pages = count_pages(config, model.layout)
    pool = KvPool(model.layout, pages, config.page_size, device)
    runner = Runner(model.module, pool, model.config.vocab_size, device, kernels=model.kernels)
    size = pages * _page_bytes(config, model.layout) / MIB
    log.info("KV memory: %d pages of %d tokens, %.1f MiB", pages, config.page_size, size)
    return Engine(runner, pool, engine_config(config)), model


def engine_config(config: WorkerConfig) -> EngineConfig:
    """The engine's share of a worker's settings."""
    return EngineConfig(
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        ageing_s=config.ageing_s,
        prefix_cache=config.prefix_cache,
    )


def count_pages(config: WorkerConfig, layout: KvLayout) -> int:
    """`pages`, or as many as `kv_mib` holds. Raises ConfigError when that is not one."""
    if config.pages:
        return config.pages
    pages = int(config.kv_mib * MIB) // _page_bytes(config, layout)
    if pages < 1:
        needed = _page_bytes(config, layout) / MIB
        raise ConfigError(f"kv_mib is {config.kv_mib:g}; one page of this model needs {needed:.3g}", "kv_mib")
    return pages


def _page_bytes(config: WorkerConfig, layout: KvLayout) -> int:
    return config.page_size * layout.token_bytes
