"""The sources that a router's settings name."""

from __future__ import annotations

from router.discovery.kubernetes import KubernetesPods
from router.discovery.sources import Discovery, FixedWorkers, Roster, WorkersFile
from tandem.config import RouterConfig


def discoveries(config: RouterConfig, roster: Roster) -> list[Discovery]:
    """Not started yet. Raises ConfigError for an address that is none."""
    found: list[Discovery] = [FixedWorkers(config.workers, roster)]
    if config.workers_file is not None:
        found.append(WorkersFile(config.workers_file, roster))
    if config.kubernetes_selector:
        found.append(KubernetesPods(config.kubernetes_namespace, config.kubernetes_selector, roster))
    return found
