"""The actor: it has one ordinary process of Tandem's under it, and takes it with it when it ends.

Whatever ends first, no process is left that could go on answering. The kernel ends the actor with its raylet and the
process with its actor; Ray's own watch of a lost raylet polls, and takes one that nobody has waited for to be alive.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tandem
from tandem.cli.children import Child, stop_all
from tandem.cli.warm_up import router_ready, until, warm_up
from tandem.config import search_path
from tandem.errors import TandemError
from tandem.parent import end_with
from tandem.ports import check_port, free_ports

STDERR = 2
"""Ray has led it into the actor's log file."""
LAST_BYTES = 4096
"""Of a process's log, which are kept to say why it ended."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor has come to be."""

    host: str
    """IP address to listen on."""
    version: str
    """Tandem's, there."""
    port: int
    """A free one."""
    http_port: int = 0
    """A router's: the one that was asked for, or a free one."""
    refusal: str = ""
    """Why nothing can be started here."""


class Supervisor:
    """One process's supervisor. Arguments and answers are plain values: they travel between machines."""

    def __init__(self, name: str) -> None:
        """name: of the process, which Ray's logs and dashboard show."""
        end_with(os.getppid(), signal.SIGKILL)
        self._name = name
        self._child: Child | None = None
        self._last = b""

    def __repr__(self) -> str:
        """What stands before each of its lines where Ray shows them."""
        return self._name

    async def place(self, host: str, http: tuple[str, int] | None = None) -> dict[str, Any]:
        """A `Place` as a dict. host: to listen on, or else the node's address. http: a router's, port 0 for any."""
        where = host or str(importlib.import_module("ray.util").get_node_ip_address())
        try:
            (port,) = free_ports(1, where)
            if http is None:
                return asdict(Place(where, tandem.__version__, port))
            check_port(*http, "--port")
            http_port = http[1] or free_ports(1, http[0])[0]
        except TandemError as error:
            return asdict(Place(where, tandem.__version__, 0, refusal=str(error)))
        return asdict(Place(where, tandem.__version__, port, http_port))

    async def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Runs `tandem ARGUMENTS` to its end; its exit status and the last line of its log.

        The log goes to the actor's own, which Ray keeps on the node, shows, and sends to whoever started the job.
        """
        root = Path(tandem.__file__).parent.parent
        child = Child(self._name, "", arguments, {**environment, **search_path(root)})
        self._child = child
        await child.start(stderr=asyncio.subprocess.PIPE)
        assert child.process is not None and child.process.stderr is not None
        while data := await child.process.stderr.read(LAST_BYTES):
            os.write(STDERR, data)
            self._last = (self._last + data)[-LAST_BYTES:]
        lines = self._last.decode(errors="replace").splitlines()
        return await child.wait(), lines[-1] if lines else ""

    async def ready(self, url: str) -> bool:
        """Returns when the router under this actor sees its workers. Raises Unavailable."""
        return await until(partial(router_ready, url), self._name)

    async def warm_up(self, url: str, bodies: Sequence[dict[str, Any]], token: str) -> str:
        """Sends requests from beside the router, which may listen on loopback alone; what went wrong."""
        try:
            await warm_up(url, bodies, token)
        except TandemError as error:
            return str(error)
        return ""

    async def pid(self) -> int:
        """Of the process, or 0."""
        return self._child.pid if self._child is not None and self._child.running else 0

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, so that what is under way ends in order; SIGKILL after the grace."""
        if self._child is not None:
            await stop_all([self._child], grace_s)
