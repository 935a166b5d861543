"""Tandem as an application of Ray Serve, which is what KubeRay's RayService keeps alive.

Serve has one replica, on the head; the replica has the launcher under it and says whether that lives. Requests do not
pass through Serve: clients speak to the router.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tandem
from tandem.cli.children import LAUNCHER
from tandem.cli.on_ray.connect import HEAD_RESOURCE
from tandem.cli.up import STOP_GRACE_S, ending
from tandem.config import child_environment, search_path
from tandem.errors import ConfigError

HEALTH_S = 5.0
"""Between Serve's questions."""
END_S = 60.0
"""For `tandem up` to end beyond its own grace: the actors' end takes time."""
SHARE = 0.001
"""Of the head's mark, which binds the replica to it."""


class Launcher:
    """The replica: one `tandem up --on ray` under it, on the cluster that the replica is part of."""

    def __init__(self, command: str, address: str = "") -> None:
        """command: what stands behind `tandem up`. address: of the cluster; default: this actor's own."""
        address = address or importlib.import_module("ray").get_runtime_context().gcs_address
        arguments = [*shlex.split(command), "--on", "ray", "--ray-address", address]
        root = Path(tandem.__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", *LAUNCHER, str(os.getpid()), "up", *arguments],
            env=child_environment(search_path(root)),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of `tandem up`."""
        return self._process.pid

    def check_health(self) -> None:
        """Raises RuntimeError once `tandem up` has ended: Serve then makes another replica."""
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"tandem up {ending(status)}; its log is this replica's")

    async def __call__(self, request: object) -> dict[str, int]:
        """Whom Serve's own HTTP port answers: there is nothing but the launcher's process id to tell."""
        return {"launcher": self.pid}

    def __del__(self) -> None:
        """Serve calls it when the replica is to end: SIGTERM, so that what is under way ends in order."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
            return
        self._process.kill()
        self._process.wait()


def application(args: Mapping[str, str]) -> Any:
    """What `import_path` names in a Serve configuration. args: `command`, what stands behind `tandem up`.

    Raises ConfigError where that is missing.
    """
    if set(args) != {"command"}:
        given = ", ".join(sorted(args)) or "empty"
        raise ConfigError(f"args are {given}; they must be `command`: what stands behind tandem up", "args")
    serve = importlib.import_module("ray.serve")
    deployment = serve.deployment(
        Launcher,
        name="tandem",
        num_replicas=1,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=END_S + STOP_GRACE_S,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_RESOURCE: SHARE}},
    )
    return deployment.bind(args["command"])
