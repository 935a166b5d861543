"""The prefill worker's process."""

from __future__ import annotations

import asyncio

from kvtransfer.backends import choose
from prefill_worker.services import build
from tandem.cluster import Role
from tandem.config import PrefillConfig, keep_native_ports_local
from tandem.freed_memory import given_back
from tandem.obs import setup_logging
from tandem.worker.process import WorkerProcess, serve


def run(config: PrefillConfig) -> int:
    """Serves until SIGTERM; returns the exit code. Raises CheckpointError, ConfigError."""
    setup_logging(config.log_level, config.log_format)
    return asyncio.run(_run(config))


async def _run(config: PrefillConfig) -> int:
    keep_native_ports_local(config.host)
    transports = choose(config.transport, config.host)
    preferred = transports.preferred
    process = WorkerProcess(config, Role.PREFILL, preferred.name, build(config, transports), preferred)
    async with given_back():
        return await serve(process)
