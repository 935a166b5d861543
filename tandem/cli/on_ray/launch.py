"""`tandem up --on ray`: places the processes of a cluster on Ray's nodes and watches them until Ctrl-C.

A worker or router that is lost, alone or with its node, gets a new actor, and with it a new process and a new
incarnation: what the old one may still say is fenced everywhere as the old one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import signal
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from rich.console import Console

from tandem.cli.banner import Standing, banner, drafts_of
from tandem.cli.on_ray.connect import Connection, connect
from tandem.cli.on_ray.keeper import Keeper, lost
from tandem.cli.on_ray.processes import Commands, Unit
from tandem.cli.on_ray.resources import demands
from tandem.cli.on_ray.scheduling import Scheduling
from tandem.cli.up import SECRET_BYTES, STOP_GRACE_S
from tandem.cli.warm_up import warming_requests
from tandem.config import UpConfig
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.ports import authority

ANSWER_S = 5.0
"""For an actor to say that its process has ended, beyond the process's own grace."""


def up_on_ray(config: UpConfig) -> int:
    """Runs the cluster until it is told to stop; returns the exit code. Raises ConfigError, Unavailable."""
    config = config.model_copy(update={"token": config.token or SecretStr(secrets.token_urlsafe(SECRET_BYTES))})
    connection = connect(config.ray_address)
    try:
        if config.ray_targets is not None:
            check_listable(config.ray_targets)
        return asyncio.run(OnRay(config, connection).run())
    finally:
        connection.close()


def check_listable(file: Path) -> None:
    """Raises ConfigError where `--ray-targets` cannot be written. Looked at late: Ray itself makes /tmp/ray."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--ray-targets: there is no folder {folder}", "ray_targets")
    if file.is_dir():
        raise ConfigError(f"--ray-targets: {file} is a folder; give a file in it", "ray_targets")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--ray-targets: nothing can be written in {folder}", "ray_targets")


class OnRay:
    """The start and the end of everything. The first failure that cannot be mended ends it."""

    def __init__(self, config: UpConfig, connection: Connection) -> None:
        self._config = config
        self._connection = connection
        self._errors = importlib.import_module("ray.exceptions")
        demand = demands(config, connection.nodes())
        self._commands = Commands(config, demand)
        self._counts = {"prefill": config.prefill, "decode": config.decode}
        self._scheduling = Scheduling(connection, demand, self._counts)
        self._keeper = Keeper(config, connection, self._scheduling, self._commands, self)
        self._tasks: list[asyncio.Task[None]] = []
        self._console = Console(stderr=True)
        self._stopping = asyncio.Event()
        self._failure = ""
        self._status = 0

    async def run(self) -> int:
        """Starts everything, waits for a signal or a failure, ends everything; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        self._spawn(self._start())
        try:
            await self._stopping.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._end()
        if self._failure:
            self.say(f"tandem: {self._failure}")
        return self._status

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self.task_ended)
        self._tasks.append(task)

    def _stop(self) -> None:
        """A first signal stops in order, a second at once."""
        if self._stopping.is_set():
            self._keeper.kill(self._keeper.units)
        self._stopping.set()

    def fail(self, reason: str, status: int = 1) -> None:
        """Ends everything; only the first reason is said."""
        if not self._stopping.is_set():
            self._failure, self._status = reason, status
        self._stopping.set()

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """Ends everything where the task raised."""
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, self._errors.RayError):
                self.fail(f"an actor {lost(error)}")
            else:
                said = str(error) if isinstance(error, TandemError) else repr(error)
                self.fail(said, 2 if isinstance(error, ConfigError) else 1)

    async def _start(self) -> None:
        """Places everything; returns when it stands."""
        await self._scheduling.reserve(self._config.ray_wait_s)
        nodes = self._connection.nodes()
        addresses = list(dict.fromkeys(node.address for node in nodes))
        chosen = addresses if self._config.ray_routers == "every" else addresses[:1]
        names = ["router"] if len(chosen) == 1 else [f"router-{at}" for at in range(len(chosen))]
        keeper = self._keeper
        keeper.routers = [Unit(n, "router", at, node=chosen[at]) for at, n in enumerate(names)]
        for router in keeper.routers:  # their ports must be known before the first worker starts
            await keeper.place(router)
        for role, count in self._counts.items():
            keeper.workers += [Unit(f"{role}-{at}", role, at) for at in range(count)]
        for unit in keeper.units:
            self._spawn(keeper.keep(unit))
        with self._console.status("starting on Ray") as status:
            await keeper.all_stand(lambda names: status.update(f"waiting for {names}"))
        await self._warm_up()
        keeper.stands = True
        self.say(self._banner(len(nodes)))

    async def _warm_up(self) -> None:
        """Raises Unavailable where a first request fails."""
        first = self._keeper.routers[0]
        bodies = warming_requests([unit.info for unit in self._keeper.workers if unit.info is not None])
        token = self._config.token.get_secret_value() if self._config.token and self._config.api_keys else ""
        if failure := await first.actor.warm_up.remote(self._keeper.url(first), bodies, token):
            raise Unavailable(failure)

    def _banner(self, nodes: int) -> str:
        config, first = self._config, self._keeper.routers[0]
        workers = [(unit.name, unit.info) for unit in self._keeper.workers if unit.info is not None]
        kind = "a new local one" if self._connection.local else f"at {self._connection.address}"
        where = f"Ray, {kind}, {nodes} node{'s' if nodes > 1 else ''}; the router is on {first.node}"
        more = [(r.name, authority(r.node, r.http_port), r.pid) for r in self._keeper.routers[1:]]
        places = (config.host, first.http_port, first.pid, self._commands.model, workers, None)
        return banner(Standing(*places, config.api_keys is not None, drafts_of(config), where, more))

    async def _end(self) -> None:
        """SIGTERM to every process, and the end of every actor; nothing stays placed."""
        grace = self._config.drain_s + STOP_GRACE_S
        ends = [unit.actor.stop.remote(grace) for unit in self._keeper.units if unit.running and unit.actor is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace + ANSWER_S):
                await asyncio.gather(*ends, return_exceptions=True)
        self._keeper.kill(self._keeper.units)
        self._scheduling.release()

    def say(self, text: str) -> None:
        """A line to standard error."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
