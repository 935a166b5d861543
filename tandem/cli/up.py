"""`tandem up`: one router and its workers on this machine, watched until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console

from tandem.cli.banner import Standing, banner, drafts_of
from tandem.cli.children import LAUNCHER, Child, stop_all
from tandem.cli.warm_up import router_ready, until, warm_up, warming_requests
from tandem.cluster import WorkerInfo
from tandem.compute_slots import ComputeSlots
from tandem.config import RouterConfig, UpConfig, WorkerConfig
from tandem.errors import TandemError
from tandem.hub import resolve_model, served_name
from tandem.ports import authority, check_port, free_ports
from tandem.trust import Trust
from tandem.wire.probe import describe

STOP_GRACE_S = 8.0
RESTART_DELAY_S = 0.5
MAX_RESTARTS = 10
"""Restarts of one worker before the cluster gives up; forgotten once one has lived for `FORGET_S`."""
FORGET_S = 600.0
SECRET_BYTES = 32
OWN_FAULT = (2, 3)
"""Exit codes of settings and checkpoints that are wrong: starting again cannot help."""
LOOPBACK = "127.0.0.1"
"""Where workers and the control port listen."""

# Workers share the cores: threads that wait must sleep, or five processes on two cores fight each other. The settings
# file is read once, here: children get what they need of it as flags.
PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TANDEM_CONFIG": "",
}

OWN = ("model", "served_model_name", "host", "port", "config", "token", "metrics_token")
"""Settings that mean something else to a child."""


def up(config: UpConfig, launcher: Sequence[str] = LAUNCHER) -> int:
    """Runs the cluster until it is told to stop; returns the exit code. Raises ConfigError.

    launcher: what starts the router; a comparison has one that puts another policy into it.
    """
    check_port(config.host, config.port, "--port")
    if config.token is None:
        config = config.model_copy(update={"token": SecretStr(secrets.token_urlsafe(SECRET_BYTES))})
    if config.port == 0:
        config = config.model_copy(update={"port": free_ports(1, config.host)[0]})
    model = resolve_model(config.model)
    slots = _compute_slots(config.prefill + config.decode)
    try:
        router, workers = plan(config, model, slots)
        router.launcher = launcher
        return asyncio.run(_Cluster(config, model, router, workers, slots).run())
    finally:
        if slots is not None:
            slots.remove()


def _compute_slots(workers: int) -> ComputeSlots | None:
    """As many slots as cores, where there are more workers than these."""
    cores = len(os.sched_getaffinity(0))
    try:
        return ComputeSlots.create(cores) if workers > cores else None
    except OSError as error:
        Console(stderr=True).print(f"tandem: {workers} workers share {cores} cores without order: {error}")
        return None


def plan(config: UpConfig, model: str, slots: ComputeSlots | None = None) -> tuple[Child, list[Child]]:
    """The router and the workers to start, with the cores divided among the workers; they share `slots`."""
    roles = ["prefill"] * config.prefill + ["decode"] * config.decode
    control, *ports = free_ports(1 + len(roles), LOOPBACK)
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(roles)))
    common = ["--served-model-name", config.served_model_name or served_name(config.model)]
    listen = ["--host", config.host, "--port", str(config.port)]
    listen += ["--control-host", LOOPBACK, "--control-port", str(control)]
    arguments = ["router", "--model", model, *listen, *common, *handed_on(config, RouterConfig)]
    passive = PASSIVE | secret_environment(config)
    router = Child("router", authority(config.host, config.port), arguments, passive)

    shared = ["--router", f"{LOOPBACK}:{control}", "--threads", threads, *handed_on(config, WorkerConfig)]
    shared += ["--compute-slots", str(slots.key)] if slots is not None else []
    environment = passive | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    workers = []
    for at, (role, port) in enumerate(zip(roles, ports, strict=True)):
        arguments = [role, model, "--host", LOOPBACK, "--port", str(port), *shared, *common]
        workers.append(Child(f"{role}-{roles[:at].count(role)}", f"{LOOPBACK}:{port}", arguments, environment))
    return router, workers


def secret_environment(config: UpConfig) -> dict[str, str]:
    """What children must know and nobody else may read: not on their command lines."""
    secrets_of = {"TANDEM_TOKEN": config.token, "TANDEM_METRICS_TOKEN": config.metrics_token}
    return {name: secret.get_secret_value() for name, secret in secrets_of.items() if secret is not None}


def handed_on(config: UpConfig, schema: type[RouterConfig] | type[WorkerConfig]) -> list[str]:
    """Flags for the settings that a child has under the same name: all, so that no variable decides otherwise."""
    flags = []
    for name in (name for name in schema.model_fields if name in UpConfig.model_fields and name not in OWN):
        value = getattr(config, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
            continue
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            flags += [flag, str(each.absolute() if isinstance(each, Path) else each)]
    return flags


class _Cluster:
    """The processes and their supervision. The first failure that cannot be mended ends everything."""

    def __init__(
        self, config: UpConfig, model: str, router: Child, workers: list[Child], slots: ComputeSlots | None
    ) -> None:
        self._slots = slots.free() if slots is not None else None
        self._config = config
        self._trust = Trust(config.token.get_secret_value() if config.token is not None else "")
        self._model = model
        self._router = router
        self._workers = workers
        self._url = f"http://{authority(config.host, config.port)}"
        self._console = Console(stderr=True)
        self._stopping = asyncio.Event()
        self._stands = False
        self._failure = ""
        self._status = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        children = [self._router, *self._workers]
        tasks: list[asyncio.Task[None]] = []
        try:
            for child in children:
                await child.start()
                tasks.append(asyncio.create_task(self._watch(child)))
            tasks.append(asyncio.create_task(self._stand()))
            for task in tasks:
                task.add_done_callback(self._task_ended)
            await self._stopping.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stop_all(children, self._config.drain_s + STOP_GRACE_S)
        if self._failure:
            self._say(f"tandem: {self._failure}")
        return self._status

    def _stop(self) -> None:
        """A first signal stops in order, a second at once."""
        if self._stopping.is_set():
            for child in (self._router, *self._workers):
                child.signal(signal.SIGKILL)
        self._stopping.set()

    def _fail(self, reason: str, status: int = 1) -> None:
        if not self._stopping.is_set():
            self._failure, self._status = reason, status
        self._stopping.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(str(error) if isinstance(error, TandemError) else repr(error))

    async def _watch(self, child: Child) -> None:
        """Starts a worker again when it dies at work. Any other end of a child ends the cluster."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            status = await child.wait()
            if clock() - begun >= FORGET_S:
                child.restarts = 0
            if status == 0 and self._stands and child is not self._router:
                self._say(f"{child.name} was told to end; it is not started again")
                return
            beyond_repair = status in OWN_FAULT or child is self._router or child.restarts >= MAX_RESTARTS
            if beyond_repair or not self._stands:
                self._fail(f"{child.name} {ending(status)}", status if status in OWN_FAULT else 1)
                return
            child.restarts += 1
            self._say(f"{child.name} {ending(status)}; starting it again")
            await asyncio.sleep(RESTART_DELAY_S)
            await child.start()

    async def _stand(self) -> None:
        """Returns when every process answers and has done everything once. Raises Unavailable."""
        with self._console.status("starting") as status:
            infos: list[WorkerInfo] = []
            for child in self._workers:
                count = f"{len(infos)} of {len(self._workers)} workers stand"
                status.update(f"loading the model: {count}, waiting for {child.name}")
                infos.append(await until(partial(describe, child.address, self._trust), child.name))
            status.update("waiting for the router to see its workers")
            await until(partial(router_ready, self._url), "the router")
            status.update("warming up: the first step and the first transfer of a process are slow")
            keys = self._config.api_keys is not None
            await warm_up(self._url, warming_requests(infos), self._trust.token if keys else "")
        names = [child.name for child in self._workers]
        workers = list(zip(names, infos, strict=True))
        self._stands = True
        config = self._config
        places = (config.host, config.port, self._router.pid, self._model, workers, self._slots)
        standing = Standing(*places, keys, drafts_of(config))
        self._say(banner(standing))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def ending(status: int) -> str:
    """How a process ended, for a sentence that begins with its name."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
