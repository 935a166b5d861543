"""Finds a Ray cluster, or starts one on this machine; every failure is one line, said before anything runs."""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from typing import Any

from tandem.cli.on_ray.resources import Node
from tandem.errors import ConfigError, Unavailable

REACH_S = 5.0
"""Ray itself would try for minutes."""
INSTALL = "pip install 'tandem-serve[ray]'"
HEAD_RESOURCE = "node:__internal_head__"
"""Which Ray gives the head alone."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A driver's connection to a Ray cluster; `close` it. `ray` is the module, which has no types."""

    ray: Any
    address: str
    """host:port of the cluster."""
    local: bool
    """Whether the cluster was started by this process and ends with it."""

    def nodes(self) -> list[Node]:
        """The live nodes, the head first."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        found = [
            Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], HEAD_RESOURCE in node["Resources"])
            for node in alive
        ]
        return sorted(found, key=lambda node: not node.head)

    def available(self) -> dict[str, float]:
        """What nobody uses now, of the whole cluster."""
        return dict(self.ray.available_resources())

    def close(self) -> None:
        """Ends the job: Ray ends its actors and gives back what they held. A cluster started here ends, too."""
        self.ray.shutdown()


def connect(address: str | None) -> Connection:
    """Joins the cluster at `address`, else the one that Ray finds, else starts one. Raises ConfigError, Unavailable."""
    ray = import_ray()
    found = bootstrap_address(address)
    if found is not None:
        check_reachable(found)
    try:
        context = ray.init(address=found or "local", logging_level="error", log_to_driver=True)
    except Exception as error:  # noqa: BLE001  Ray raises the bare class, too; all of it ends in one line
        ray.shutdown()
        raise explained(error, found) from None
    return Connection(ray, str(context.address_info["gcs_address"]), found is None)


def import_ray() -> Any:
    """The module. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--on is ray; ray cannot be imported ({error}): {INSTALL}", "on") from None


def bootstrap_address(given: str | None) -> str | None:
    """host:port of the cluster by Ray's own rules; None where there is none and a new one is to be started."""
    services = importlib.import_module("ray._private.services")  # what ray.init asks; it has no public name
    try:
        found = services.canonicalize_bootstrap_address(given)
    except (ValueError, OSError) as error:
        hint = "give host:port of the cluster itself, and run this on one of its machines: ray job submit -- tandem up"
        raise ConfigError(f"--ray-address: {error}; {hint}", "ray_address") from None
    return None if found is None else str(found)


def check_reachable(address: str) -> None:
    """Raises Unavailable where nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"--ray-address: no Ray cluster answers at {address}: {reason}") from None


def explained(error: Exception, address: str | None) -> Exception:
    """What `ray.init` raised, for people."""
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        return ConfigError(f"--ray-address: the cluster at {address} runs another version: {text}", "ray_address")
    return Unavailable(f"Ray could not be {'started here' if address is None else f'joined at {address}'}: {text}")
