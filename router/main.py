"""The router's process: control plane, HTTP server, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import uvicorn
import uvloop
from fastapi import FastAPI

from router.control import ControlPlane
from router.http.api import Api
from router.http.app import create_app
from router.http.http_limits import LimitedHttp
from router.metrics import RouterMetrics
from router.monitoring.monitor import monitored
from router.requests.texts import ModelTexts
from router.siblings import Siblings
from router.supervisor import Place, supervise
from router.workers.registry import Relay
from tandem.config import RouterConfig
from tandem.freed_memory import given_back
from tandem.obs import setup_logging
from tandem.ports import allow_descriptors, check_port, refused
from tandem.text.tokenizer import import_transformers_without_torch
from tandem.trust import Trust

log = logging.getLogger(__name__)

CLOSE_GRACE_S = 2
"""Seconds for telling clients so."""
KEEP_ALIVE_S = 75
"""Seconds an idle connection is kept: longer than clients and load balancers keep theirs, so that they close first."""
BACKLOG = 2048
READY_POLL_S = 0.05


def run(config: RouterConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises ConfigError."""
    setup_logging(config.log_level, config.log_format)
    import_transformers_without_torch()
    with listen(config.host, config.port) as listener:
        if config.processes == 1:
            return uvloop.run(_serve(config, listener))
        address = listener.getsockname()
    check_port(config.control_host, config.control_port, "--control-port")
    with ExitStack() as stack:
        listeners = [stack.enter_context(_shared(*address[:2])) for _ in range(config.processes)]
        return supervise(listeners, lambda place: uvloop.run(_serve(config, place.listener, place)))


def listen(host: str, port: int) -> socket.socket:
    """Takes the HTTP port before anything is started. Raises ConfigError when it is not free."""
    listener = _socket(host)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise refused(error, host, port, "--port") from None
    listener.listen(BACKLOG)
    return listener


def _socket(host: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


def _shared(host: str, port: int) -> socket.socket:
    """One of several sockets on a port that was just seen to be free."""
    made = _socket(host)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    made.listen(BACKLOG)
    return made


async def _serve(config: RouterConfig, listener: socket.socket, place: Place | None = None) -> int:
    metrics = RouterMetrics()
    relay = siblings = None
    if place is not None:
        relay = Relay(place.folder, place.index, place.count, Trust.of(config))
        siblings = Siblings(place.folder, place.index, place.count)
    async with ControlPlane(config, relay) as control, monitored(config, control, metrics), given_back():
        texts = ModelTexts(
            config.model, config.generation_config == "auto", config.chat_template, config.turn_cache_mib << 20
        )
        timers = control.traces.start if control.traces is not None else None
        api = Api(config, control.dispatcher, texts, metrics, control.recorder, control.callers, siblings, timers)
        server = HttpServer(create_app(config, api), config.drain_s, allow_descriptors(config.max_connections))
        host, port = listener.getsockname()[:2]
        router_id = control.fleet.router_id
        log.info("router %s listens on http://%s:%d, workers register at port %d", router_id, host, port, control.port)
        ending = asyncio.create_task(_end_streams(server, control, config.drain_s))
        asked = None if siblings is None else await siblings.serve(api.tell_sibling)
        try:
            if place is not None and place.replacement:
                await _until_ready(control, config.lease_s)
            await server.serve([listener])
        finally:
            if asked is not None:
                asked.close()
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
    return 0


async def _until_ready(control: ControlPlane, limit_s: float) -> None:
    """Lets clients wait in the socket's queue until workers are known again: refusing them would be worse."""
    try:
        async with asyncio.timeout(limit_s):
            while not control.dispatcher.ready():  # noqa: ASYNC110 - it depends on all that workers report
                await asyncio.sleep(READY_POLL_S)
    except TimeoutError:
        log.warning("no decode worker is known after %g seconds; requests are refused until there is one", limit_s)


async def _end_streams(server: HttpServer, control: ControlPlane, drain_s: float) -> None:
    """Once the server is told to stop: lets answers go on for a while, then ends them with errors that clients see."""
    await server.stopping.wait()
    await asyncio.sleep(drain_s)
    await control.dispatcher.close()


class HttpServer(uvicorn.Server):
    """Uvicorn with its signals on the event loop: it raises them again at its end, before others could close."""

    def __init__(self, app: FastAPI, drain_s: float, max_connections: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(LimitedHttp, max_connections=max_connections),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain_s) + CLOSE_GRACE_S,
            )
        )
        self.stopping = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A first signal stops in order, a second at once."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stopping.set()
