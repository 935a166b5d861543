"""The settings of every process: one schema for flags, environment (`TANDEM_*`) and YAML; the only environment reader.

Precedence: flag, then environment, then the YAML file named by `--config`, then the default.
"""

from __future__ import annotations

from tandem.config.drain import DrainConfig
from tandem.config.environment import (
    cache_folder,
    child_environment,
    client_key,
    keep_native_ports_local,
    own_settings,
    search_path,
    set_before_import,
)
from tandem.config.process import ProcessConfig, Settings, dump
from tandem.config.router import RouterConfig
from tandem.config.train_draft import TrainDraftConfig
from tandem.config.up import UpConfig
from tandem.config.worker import DecodeConfig, PrefillConfig, WorkerConfig

__all__ = [
    "DecodeConfig",
    "DrainConfig",
    "PrefillConfig",
    "ProcessConfig",
    "RouterConfig",
    "Settings",
    "TrainDraftConfig",
    "UpConfig",
    "WorkerConfig",
    "cache_folder",
    "child_environment",
    "client_key",
    "dump",
    "keep_native_ports_local",
    "own_settings",
    "search_path",
    "set_before_import",
]
