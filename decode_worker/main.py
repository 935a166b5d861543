"""The decode worker's process."""

from __future__ import annotations

import asyncio

from decode_worker.services import build
from kvtransfer.backends import choose
from tandem.cluster import Role
from tandem.config import DecodeConfig, keep_native_ports_local
from tandem.freed_memory import given_back
from tandem.obs import setup_logging
from tandem.worker.process import WorkerProcess, serve


def run(config: DecodeConfig) -> int:
    """Serves until SIGTERM; returns the exit code. Raises CheckpointError, ConfigError."""
    setup_logging(config.log_level, config.log_format)
    return asyncio.run(_run(config))


async def _run(config: DecodeConfig) -> int:
    keep_native_ports_local(config.host)
    transports = choose(config.transport, config.host)
    preferred = transports.preferred
    process = WorkerProcess(config, Role.DECODE, preferred.name, build(config, transports), preferred)
    async with given_back():
        return await serve(process)
