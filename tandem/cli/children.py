"""Child processes that cannot outlive their supervisor."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.config import child_environment

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal the kernel sends a process when its parent dies."""

_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class Child:
    """One process of the cluster and how to start it again."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0

    async def start(self) -> None:
        """Starts `tandem ARGUMENTS` in a process group of its own, so that a Ctrl-C reaches the supervisor alone."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tandem.cli",
            *self.arguments,
            env=child_environment(self.environment),
            stdin=asyncio.subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,
        )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        """Sends a signal to the child's whole group, if it lives."""
        if self.process is not None and self.running:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return

    async def wait(self) -> int:
        """The exit status, once there is one."""
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
