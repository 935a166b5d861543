"""`tandem up --on ray`: places the processes of a cluster on Ray's nodes and watches them until Ctrl-C.

A worker or router that is lost, alone or with its node, gets a new actor, and with it a new process and a new
incarnation: what the old one may still say is fenced everywhere as the old one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import secrets
import signal
from functools import partial
from typing import Any

from pydantic import SecretStr
from rich.console import Console

import tandem
from tandem.cli.banner import Standing, banner, drafts_of
from tandem.cli.on_ray import targets
from tandem.cli.on_ray.connect import Connection, connect
from tandem.cli.on_ray.processes import Commands, Unit
from tandem.cli.on_ray.resources import demands
from tandem.cli.on_ray.scheduling import Scheduling
from tandem.cli.on_ray.supervisor import Place
from tandem.cli.up import LOOPBACK, MAX_RESTARTS, OWN_FAULT, RESTART_DELAY_S, SECRET_BYTES, STOP_GRACE_S, ending
from tandem.cli.warm_up import until, warming_requests
from tandem.config import UpConfig
from tandem.errors import ConfigError, TandemError
from tandem.ports import authority
from tandem.trust import Trust
from tandem.wire.probe import describe

ANSWER_S = 5.0
"""For an actor to say that its process has ended, beyond the process's own grace."""


def up_on_ray(config: UpConfig) -> int:
    """Runs the cluster until it is told to stop; returns the exit code. Raises ConfigError, Unavailable."""
    config = config.model_copy(update={"token": config.token or SecretStr(secrets.token_urlsafe(SECRET_BYTES))})
    connection = connect(config.ray_address)
    try:
        return asyncio.run(OnRay(config, connection).run())
    finally:
        connection.close()


class OnRay:
    """The processes and their supervision. The first failure that cannot be mended ends everything."""

    def __init__(self, config: UpConfig, connection: Connection) -> None:
        assert config.token is not None
        self._config = config
        self._connection = connection
        self._errors = importlib.import_module("ray.exceptions")
        self._trust = Trust(config.token.get_secret_value())
        demand = demands(config, connection.nodes())
        self._commands = Commands(config, demand)
        self._counts = {"prefill": config.prefill, "decode": config.decode}
        self._scheduling = Scheduling(connection, demand, self._counts)
        self._routers: list[Unit] = []
        self._workers: list[Unit] = []
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._console = Console(stderr=True)
        self._stopping = asyncio.Event()
        self._stands = False
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
            self._say(f"tandem: {self._failure}")
        return self._status

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _stop(self) -> None:
        """A first signal stops in order, a second at once."""
        if self._stopping.is_set():
            self._kill(self._units)
        self._stopping.set()

    def _fail(self, reason: str, status: int = 1) -> None:
        if not self._stopping.is_set():
            self._failure, self._status = reason, status
        self._stopping.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, self._errors.RayError):
                self._fail(f"an actor {lost(error)}")
            else:
                said = str(error) if isinstance(error, TandemError) else repr(error)
                self._fail(said, 2 if isinstance(error, ConfigError) else 1)

    @property
    def _units(self) -> list[Unit]:
        return [*self._routers, *self._workers]

    async def _start(self) -> None:
        """Places everything; returns when it stands."""
        await self._scheduling.reserve(self._config.ray_wait_s)
        nodes = self._connection.nodes()
        addresses = list(dict.fromkeys(node.address for node in nodes))
        chosen = addresses if self._config.ray_routers == "every" else addresses[:1]
        names = ["router"] if len(chosen) == 1 else [f"router-{at}" for at in range(len(chosen))]
        self._routers = [Unit(n, "router", at, node=chosen[at]) for at, n in enumerate(names)]
        for router in self._routers:  # their ports must be known before the first worker starts
            await self._place(router)
        for role, count in self._counts.items():
            self._workers += [Unit(f"{role}-{at}", role, at) for at in range(count)]
        for unit in self._units:
            self._spawn(self._keep(unit))
        await self._all_stand()
        await self._warm_up()
        self._stands = True
        self._say(self._banner(len(nodes)))

    async def _place(self, unit: Unit) -> None:
        """A new actor for the unit. Raises ConfigError where nothing can be started, ray's errors where it is lost."""
        host = LOOPBACK if self._connection.local else ""
        if unit.role == "router":
            unit.actor = await self._scheduling.router(unit)
            if unit.port:  # workers know it at its ports: it starts again at these
                return
            http = (self._config.host, self._config.port)
            place = Place(**await unit.actor.place.remote(host, http))
        else:
            unit.actor = await self._scheduling.worker(unit)
            place = Place(**await unit.actor.place.remote(host))
        if place.refusal:
            raise ConfigError(f"{unit.name} on {place.host}: {place.refusal}")
        if place.version != tandem.__version__:
            here = tandem.__version__
            raise ConfigError(f"{unit.name} on {place.host}: Tandem {place.version} is installed there, {here} here")
        unit.host, unit.port, unit.http_port = place.host, place.port, place.http_port

    async def _keep(self, unit: Unit) -> None:
        """Has the unit's process run, again and again, until that makes no sense."""
        while True:
            status, reason = await self._run(unit)
            beyond_repair = status in OWN_FAULT or unit.restarts >= MAX_RESTARTS
            if beyond_repair or not self._stands:
                self._fail(f"{unit.name} {reason}", status if status in OWN_FAULT and status else 1)
                return
            unit.restarts += status is not None
            unit.lost_at = asyncio.get_running_loop().time()
            self._list_targets()
            self._say(f"{unit.name} {reason}; starting it again")
            self._kill([unit])
            await asyncio.sleep(RESTART_DELAY_S)

    async def _run(self, unit: Unit) -> tuple[int | None, str]:
        """One actor and its process, to the end: the process's status, None where the actor was lost, and how."""
        try:
            if unit.actor is None:
                await self._place(unit)
            if unit.role == "router":
                arguments, environment = self._commands.router(unit)
            else:
                arguments, environment = self._commands.worker(unit, [router.address for router in self._routers])
            unit.running = True
            introduced = asyncio.create_task(self._introduce(unit))
            try:
                status, last = await unit.actor.run.remote(arguments, environment)
            finally:
                introduced.cancel()
                await asyncio.gather(introduced, return_exceptions=True)
        except self._errors.RayError as error:
            unit.running = False
            return None, lost(error)
        unit.running = False
        said = f": {last.removeprefix('tandem: ')}" if status in OWN_FAULT else ""
        return status, ending(status) + said

    async def _introduce(self, unit: Unit) -> None:
        """Waits until the process answers, and notes who it is."""
        try:
            if unit.role == "router":
                await unit.actor.ready.remote(self._url(unit))
                unit.pid = await unit.actor.pid.remote()
            else:
                unit.info = await until(partial(describe, unit.address, self._trust), unit.name)
                unit.pid = unit.info.pid
        except self._errors.RayActorError:  # its actor is lost, which `_run` hears as well
            return
        except (TandemError, self._errors.RayError) as error:
            self._fail(f"{unit.name}: {' '.join(str(error).split())}")
            return
        if unit.lost_at is not None:
            seconds = asyncio.get_running_loop().time() - unit.lost_at
            self._say(f"{unit.name} stands again, at {unit.address}, {seconds:.1f} s after it was lost")
        unit.lost_at = None
        self._list_targets()
        async with self._changed:
            self._changed.notify_all()

    async def _all_stand(self) -> None:
        with self._console.status("starting on Ray") as status:
            async with self._changed:
                while waiting := [unit.name for unit in self._units if not unit.pid]:
                    status.update(f"waiting for {', '.join(waiting)}")
                    await self._changed.wait()

    async def _warm_up(self) -> None:
        first = self._routers[0]
        bodies = warming_requests([unit.info for unit in self._workers if unit.info is not None])
        token = self._trust.token if self._config.api_keys is not None else ""
        if failure := await first.actor.warm_up.remote(self._url(first), bodies, token):
            self._fail(failure)

    def _url(self, router: Unit) -> str:
        return f"http://{authority(self._config.host, router.http_port)}"

    def _banner(self, nodes: int) -> str:
        config, first = self._config, self._routers[0]
        workers = [(unit.name, unit.info) for unit in self._workers if unit.info is not None]
        kind = "a new local one" if self._connection.local else f"at {self._connection.address}"
        where = f"Ray, {kind}, {nodes} node{'s' if nodes > 1 else ''}; the router is on {first.node}"
        more = [(r.name, authority(r.node, r.http_port), r.pid) for r in self._routers[1:]]
        places = (config.host, first.http_port, first.pid, self._commands.model, workers, None)
        return banner(Standing(*places, config.api_keys is not None, drafts_of(config), where, more))

    def _list_targets(self) -> None:
        if self._config.ray_targets is not None:
            groups = targets.targets(self._units, self._config.host, self._commands.served_name)
            targets.write(self._config.ray_targets, groups)

    async def _end(self) -> None:
        """SIGTERM to every process, and the end of every actor; nothing stays placed."""
        grace = self._config.drain_s + STOP_GRACE_S
        ends = [unit.actor.stop.remote(grace) for unit in self._units if unit.running]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace + ANSWER_S):
                await asyncio.gather(*ends, return_exceptions=True)
        self._kill(self._units)
        self._scheduling.release()

    def _kill(self, units: list[Unit]) -> None:
        """Ends actors, and by that their processes, at once."""
        for unit in units:
            if unit.actor is not None:
                self._connection.ray.kill(unit.actor, no_restart=True)
                unit.actor = None

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def lost(error: Exception) -> str:
    """Ray's error about an actor, for a sentence that begins with the process's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("node" in line.lower() and "died" in line.lower() for line in lines):
        return "was lost with its node"
    if "unavailable" in type(error).__name__.lower():
        return "was lost: its actor cannot be reached"
    return f"was lost with its actor: {lines[-1] if lines else type(error).__name__}"
