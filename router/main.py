"""The router's process: control plane, HTTP server, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn

from router.app import create_app
from router.control import ControlPlane
from router.fleet_metrics import FleetMetrics
from router.metrics import RouterMetrics
from router.texts import ModelTexts
from tandem.config import RouterConfig
from tandem.errors import ConfigError
from tandem.obs import setup_logging

log = logging.getLogger(__name__)

STOP_GRACE_S = 2
"""Seconds that answers under way get when the router is told to stop; then they end with an error event."""
BACKLOG = 2048


def run(config: RouterConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises ConfigError."""
    setup_logging(config.log_level, config.log_format)
    with listen(config.host, config.port) as listener:
        with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
            return runner.run(_serve(config, listener))


def listen(host: str, port: int) -> socket.socket:
    """Takes the HTTP port before anything is started. Raises ConfigError when it is not free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port: {host}:{port} cannot be used: {error.strerror or error}", param="port") from None
    listener.listen(BACKLOG)
    return listener


async def _serve(config: RouterConfig, listener: socket.socket) -> int:
    metrics = RouterMetrics()
    async with ControlPlane(config) as control:
        metrics.add_collector(FleetMetrics(control.fleet).collect)
        app = create_app(config, control.dispatcher, ModelTexts(config.model), metrics)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=STOP_GRACE_S,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        host, port = listener.getsockname()[:2]
        log.info("router %s listens on http://%s:%d, workers register at port %d", control.fleet.router_id, host, port, control.port)
        await server.serve([listener])
    return 0
