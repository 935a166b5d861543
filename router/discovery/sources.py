"""Where workers' addresses come from.

Four ways, which may be used together: a fixed list, a file that is read again when it changes, the pods of a
Kubernetes namespace (`router.discovery.kubernetes`), and workers that register themselves and renew a lease
(`router.workers.registry`). Another one is an object with `start` and `run` that tells a `Roster` of addresses that
come and go; what answers there is asked who it is, so a source never has to say what a worker is or whether it lives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import yaml

from router.file_watch import FileWatch
from tandem.cluster import Role
from tandem.errors import ConfigError

ADDRESS = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})$")
MAX_ADDRESSES = 10_000


class Roster(Protocol):
    """Who is told: the fleet."""

    def follow(self, address: str, role: Role | None = None) -> None:
        """A worker may be at host:port: it is looked for until `unfollow`, whether or not it answers.

        role: what it is known as; one that says something else of itself is not used.
        """

    def unfollow(self, address: str) -> None:
        """No worker is to be looked for there any more; one that is there, or comes, gets no new requests."""


class Discovery(Protocol):
    """A source of addresses. Both are called once, `start` first."""

    async def start(self) -> None:
        """Tells the roster what is known. Raises ConfigError when the source is wrong, Unavailable when it is away."""

    async def run(self) -> None:
        """Follows the source until cancelled, or returns when nothing can change."""


class FixedWorkers:
    """A list that never changes."""

    def __init__(self, addresses: Iterable[str], roster: Roster) -> None:
        self._addresses = checked(addresses, "--workers")
        self._roster = roster

    async def start(self) -> None:
        """See `Discovery`."""
        for address in self._addresses:
            self._roster.follow(address)

    async def run(self) -> None:
        """Nothing changes."""


class WorkersFile:
    """A YAML or JSON file with a list of addresses, bare or under `workers`."""

    def __init__(self, path: Path, roster: Roster) -> None:
        self._roster = roster
        self._known: tuple[str, ...] = ()
        self._watch = FileWatch(path, self._apply)

    async def start(self) -> None:
        """See `Discovery`."""
        self._watch.read()

    async def run(self) -> None:
        """See `Discovery`."""
        await self._watch.run()

    def look(self) -> None:
        """Reads the file now, if it has changed."""
        self._watch.look()

    def _apply(self, path: Path) -> None:
        listed = read_addresses(path)
        known, self._known = self._known, listed
        for address in listed:
            if address not in known:
                self._roster.follow(address)
        for address in known:
            if address not in listed:
                self._roster.unfollow(address)


def read_addresses(path: Path) -> tuple[str, ...]:
    """The addresses in a file. Raises ConfigError that names what is wrong."""
    where = f"--workers-file is {path}"
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}; it cannot be read: {' '.join(str(error).split())}", "workers_file") from None
    listed = content.get("workers") if isinstance(content, dict) else content
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(isinstance(address, str) for address in listed):
        raise ConfigError(f"{where}; it must be a list of host:port, bare or under `workers`", "workers_file")
    return checked(listed, where)


def checked(addresses: Iterable[str], where: str) -> tuple[str, ...]:
    """Each address once. Raises ConfigError for what is no host:port."""
    found = tuple(dict.fromkeys(addresses))
    for address in found:
        match = ADDRESS.match(address)
        if match is None or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"{where}; {address[:100]!r} is not host:port")
    if len(found) > MAX_ADDRESSES:
        raise ConfigError(f"{where}; {len(found)} addresses are listed, and at most {MAX_ADDRESSES} are followed")
    return found
