"""The processes of a cluster on Ray: what each is told, and where it stands now."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.cli.on_ray.resources import Amounts
from tandem.cli.up import PASSIVE, SECRET_BYTES, handed_on, secret_environment
from tandem.cluster import WorkerInfo
from tandem.config import RouterConfig, UpConfig, WorkerConfig, own_settings
from tandem.hub import served_name
from tandem.ports import authority


@dataclass(slots=True, eq=False)
class Unit:
    """One process and its actor; a new actor takes the place of one that was lost."""

    name: str
    role: str
    """router, prefill or decode."""
    index: int
    """Among the processes of its role: a worker's bundle in the role's placement group."""
    host: str = ""
    """IP address that it listens on for gRPC: of its node, or loopback."""
    node: str = ""
    """Address, as Ray knows it, of the node that a router belongs to."""
    actor: Any = None
    port: int = 0
    """A worker's port; a router's control port, which stays the same."""
    http_port: int = 0
    """A router's."""
    running: bool = False
    """Whether its process was started, and its end not yet seen."""
    restarts: int = 0
    """After ends of its process alone: a node that is lost is not its fault."""
    info: WorkerInfo | None = None
    """What a worker that stands says of itself."""
    pid: int = 0
    """Of its process once that has answered; 0 after it was told to end."""
    lost_at: float | None = None
    """Since when it does not stand, on the launcher's monotonic clock; None while it stands."""
    losses: int = 0
    """Since it stood last: actors lost or refused, processes ended."""
    said: str = ""
    """What people were told of it last, since it stood last."""

    @property
    def address(self) -> str:
        """host:port of its gRPC port."""
        return authority(self.host, self.port)


class Commands:
    """Command lines and environments, for processes on any machine."""

    def __init__(self, config: UpConfig, demand: Mapping[str, Amounts]) -> None:
        """demand: role -> resources of each of its workers."""
        self._config = config
        self._demand = demand
        # Workers refuse to show their metrics to everybody who reaches them: without a secret, nobody sees them.
        self._closed = {"TANDEM_METRICS_TOKEN": secrets.token_urlsafe(SECRET_BYTES)}
        folder = Path(config.model)
        self.model = str(folder.absolute()) if folder.exists() else config.model
        self.served_name = config.served_model_name or served_name(config.model)
        self._common = ["--served-model-name", self.served_name]

    def router(self, unit: Unit) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a router. Workers register at its node's address."""
        config = self._config
        listen = ["--host", config.host, "--port", str(unit.http_port)]
        listen += ["--control-host", unit.host, "--control-port", str(unit.port)]
        arguments = ["router", "--model", self.model, *listen, *self._common, *handed_on(config, RouterConfig)]
        return arguments, self._environment()

    def worker(self, unit: Unit, routers: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a worker that registers at `routers`."""
        demand = self._demand[unit.role]
        threads = str(max(1, int(demand.get("CPU", 1))))
        arguments = [unit.role, self.model, "--host", unit.host, "--port", str(unit.port), "--threads", threads]
        for router in routers:
            arguments += ["--router", router]
        arguments += ["--device", "cuda"] if demand.get("GPU") else []
        arguments += [*self._common, *handed_on(self._config, WorkerConfig)]
        environment = self._closed | self._environment()
        return arguments, environment | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def _environment(self) -> dict[str, str]:
        return own_settings() | PASSIVE | secret_environment(self._config)
