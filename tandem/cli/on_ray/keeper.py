"""Keeps the processes of a cluster on Ray: a new actor for each that is lost, for as long as that makes sense.

While the cluster starts, whatever goes wrong ends it. Once it stands, what one replacement meets costs no other
process anything: it is said, and tried again after a pause that grows.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import tandem
from tandem.cli.on_ray import targets
from tandem.cli.on_ray.connect import Connection
from tandem.cli.on_ray.processes import Commands, Unit
from tandem.cli.on_ray.supervisor import Place
from tandem.cli.up import FORGET_S, LOOPBACK, MAX_RESTARTS, OWN_FAULT, RESTART_DELAY_S, ending
from tandem.cli.warm_up import until
from tandem.config import UpConfig
from tandem.errors import ConfigError, TandemError
from tandem.ports import authority
from tandem.trust import Trust
from tandem.wire.probe import describe

MAX_DELAY_S = 30.0
"""Between two actors for one process."""
DOUBLINGS = 10
"""Beyond which the delay is at its maximum for certain."""


class Schedules(Protocol):
    """What gives a unit its actor: `Scheduling`."""

    async def worker(self, unit: Unit) -> Any:
        """A new actor for a worker."""

    async def router(self, unit: Unit) -> Any:
        """A new actor for a router."""


class Launches(Protocol):
    """Whom the keeper tells what happens."""

    def say(self, text: str) -> None:
        """A line for people."""

    def fail(self, reason: str, status: int = 1) -> None:
        """Ends the cluster."""

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """Ends the cluster where the task raised."""


class Keeper:
    """The units of a cluster, their actors and their processes."""

    def __init__(
        self, config: UpConfig, connection: Connection, scheduling: Schedules, commands: Commands, launcher: Launches
    ) -> None:
        assert config.token is not None
        self.routers: list[Unit] = []
        self.workers: list[Unit] = []
        self.stands = False
        """Whether all of them have stood once: what is lost from then on is made anew."""
        self._config = config
        self._connection = connection
        self._scheduling = scheduling
        self._commands = commands
        self._launcher = launcher
        self._errors = importlib.import_module("ray.exceptions")
        self._trust = Trust(config.token.get_secret_value())
        self._changed = asyncio.Condition()
        self._unlisted = ""

    @property
    def units(self) -> list[Unit]:
        """All, routers first."""
        return [*self.routers, *self.workers]

    async def all_stand(self, waiting_for: Callable[[str], None]) -> None:
        """Returns when every process has answered once. waiting_for: is told the names of those that have not."""
        async with self._changed:
            while waiting := [unit.name for unit in self.units if not unit.pid]:
                waiting_for(", ".join(waiting))
                await self._changed.wait()

    async def place(self, unit: Unit) -> None:
        """A new actor for the unit. Raises ConfigError where nothing can be started, ray's errors where it is lost."""
        host = LOOPBACK if self._connection.local else ""
        if unit.role == "router":
            unit.actor = await self._scheduling.router(unit)
            if unit.port:  # workers know it at its ports: it starts again at these
                return
            answer = await unit.actor.place.remote(host, (self._config.host, self._config.port))
        else:
            unit.actor = await self._scheduling.worker(unit)
            answer = await unit.actor.place.remote(host)
        where = f"{unit.name} on {answer['host']}"
        if answer["version"] != tandem.__version__:  # first: another version's answer may have other fields
            here = tandem.__version__
            raise ConfigError(f"{where}: Tandem {answer['version']} is installed there, {here} here")
        place = Place(**answer)
        if place.refusal:
            raise ConfigError(f"{where}: {place.refusal}")
        unit.host, unit.port, unit.http_port = place.host, place.port, place.http_port

    async def keep(self, unit: Unit) -> None:
        """Has the unit's process run, again and again, until that makes no sense."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            status, reason = await self._run(unit)
            if clock() - begun >= FORGET_S:
                unit.restarts = 0
            if status == 0 and self.stands and unit.role != "router":
                self._retire(unit)
                return
            beyond_repair = status in OWN_FAULT or unit.restarts >= MAX_RESTARTS
            if beyond_repair or not self.stands:
                self._launcher.fail(f"{unit.name} {reason}", status if status in OWN_FAULT and status else 1)
                return
            unit.restarts += status is not None
            if unit.lost_at is None:
                unit.lost_at = clock()
            self.list_targets()
            self._say_once(unit, f"{unit.name} {reason}; starting it again")
            self.kill([unit])
            await asyncio.sleep(delay(unit.losses))
            unit.losses += 1

    def _retire(self, unit: Unit) -> None:
        """Leaves a worker that was told to end, by `tandem drain` or SIGTERM, as it is."""
        self._launcher.say(f"{unit.name} was told to end; it is not started again")
        unit.pid = 0
        self.list_targets()
        self.kill([unit])

    async def _run(self, unit: Unit) -> tuple[int | None, str]:
        """One actor and its process, to the end: the process's status, None where there is none, and how it ended."""
        try:
            if unit.actor is None:
                await self.place(unit)
            if unit.role == "router":
                arguments, environment = self._commands.router(unit)
            else:
                arguments, environment = self._commands.worker(unit, [router.address for router in self.routers])
            unit.running = True
            introduced = asyncio.create_task(self._introduce(unit))
            introduced.add_done_callback(self._launcher.task_ended)
            try:
                status, last = await unit.actor.run.remote(arguments, environment)
            finally:
                introduced.cancel()
                await asyncio.gather(introduced, return_exceptions=True)
        except self._errors.RayError as error:
            unit.running = False
            return None, lost(error)
        except ConfigError as error:
            if not self.stands:
                raise
            return None, str(error).removeprefix(unit.name + " ")
        unit.running = False
        said = f": {last.removeprefix('tandem: ')}" if status in OWN_FAULT else ""
        return status, ending(status) + said

    async def _introduce(self, unit: Unit) -> None:
        """Waits until the process answers, and notes who it is."""
        while True:
            try:
                await self._meet(unit)
                break
            except self._errors.RayActorError:  # its actor is lost, which `_run` hears as well
                return
            except (TandemError, self._errors.RayError) as error:
                said = f"{unit.name}: {' '.join(str(error).split()).removeprefix(unit.name + ' ')}"
                if not self.stands:
                    self._launcher.fail(said)
                    return
                self._say_once(unit, f"{said}; waiting on")
            await asyncio.sleep(RESTART_DELAY_S)
        if unit.lost_at is not None:
            seconds = asyncio.get_running_loop().time() - unit.lost_at
            self._launcher.say(f"{unit.name} stands again, at {unit.address}, {seconds:.1f} s after it was lost")
        unit.lost_at, unit.losses, unit.said = None, 0, ""
        self.list_targets()
        async with self._changed:
            self._changed.notify_all()

    async def _meet(self, unit: Unit) -> None:
        """Raises Unavailable where it does not answer in time, ray's errors."""
        if unit.role == "router":
            await unit.actor.ready.remote(self.url(unit))
            unit.pid = await unit.actor.pid.remote()
        else:
            unit.info = await until(partial(describe, unit.address, self._trust), unit.name)
            unit.pid = unit.info.pid

    def url(self, router: Unit) -> str:
        """Where a router answers those who are on its node."""
        return f"http://{authority(self._config.host, router.http_port)}"

    def list_targets(self) -> None:
        """Brings `--ray-targets` up to date; where that fails it is said, once for each reason, and nothing ends."""
        file = self._config.ray_targets
        if file is None:
            return
        try:
            targets.write(file, targets.targets(self.units, self._config.host, self._commands.served_name))
        except OSError as error:
            why = error.strerror or type(error).__name__
            if why != self._unlisted:
                self._launcher.say(f"--ray-targets: {file} cannot be written and is out of date: {why}")
            self._unlisted = why
        else:
            self._unlisted = ""

    def kill(self, units: Sequence[Unit]) -> None:
        """Ends actors, and by that their processes, at once."""
        for unit in units:
            if unit.actor is not None:
                self._connection.ray.kill(unit.actor, no_restart=True)
                unit.actor = None

    def _say_once(self, unit: Unit, text: str) -> None:
        """Unless it is what was said of the unit last, since it stood."""
        if text != unit.said:
            self._launcher.say(text)
        unit.said = text


def delay(losses: int) -> float:
    """Seconds before the next actor of a unit that was lost `losses` times already since it last stood."""
    return float(min(MAX_DELAY_S, RESTART_DELAY_S * 2 ** min(losses, DOUBLINGS)))


def lost(error: Exception) -> str:
    """Ray's error about an actor, for a sentence that begins with the process's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("node" in line.lower() and "died" in line.lower() for line in lines):
        return "was lost with its node"
    if "unavailable" in type(error).__name__.lower():
        return "was lost: its actor cannot be reached"
    return f"was lost with its actor: {lines[-1] if lines else type(error).__name__}"
