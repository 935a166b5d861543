"""Child processes that cannot outlive their supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.config import child_environment

LAUNCHER = ("tandem.cli.child",)
"""The module that runs a command in a process of its own, and what it is told first."""


@dataclass(slots=True)
class Child:
    """One process of the cluster and how to start it again."""

    name: str
    address: str
    """host:port it serves at."""
    arguments: Sequence[str]
    environment: Mapping[str, str]
    launcher: Sequence[str] = LAUNCHER
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0

    async def start(self, stderr: int | None = None) -> None:
        """Starts `tandem ARGUMENTS` in a session of its own, so that a Ctrl-C reaches the supervisor alone.

        stderr: where its log goes; default: where the supervisor's goes.
        """
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *self.launcher,
            str(os.getpid()),
            *self.arguments,
            env=child_environment(dict(self.environment)),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        """Of the process last started."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the child's whole group, if it lives."""
        if self.running:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return

    async def wait(self) -> int:
        """The exit status, once there is one; negative for a signal."""
        assert self.process is not None
        return await self.process.wait()


async def stop_all(children: Sequence[Child], grace_s: float) -> None:
    """SIGTERM to all, then SIGKILL to those that did not end within the grace."""
    for child in children:
        child.signal(signal.SIGTERM)
    waits = [asyncio.create_task(child.wait()) for child in children if child.running]
    if waits:
        _, late = await asyncio.wait(waits, timeout=grace_s)
        if late:
            for child in children:
                child.signal(signal.SIGKILL)
            await asyncio.wait(late)
