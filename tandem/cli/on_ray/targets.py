"""A file for Prometheus' `file_sd_configs` that names every metrics page of a cluster on Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router.monitoring.targets import worker_group
from tandem.cli.on_ray.processes import Unit
from tandem.ports import authority


def targets(units: Sequence[Unit], http_host: str, model_name: str) -> list[dict[str, Any]]:
    """One group for each process that stands, with the labels of a router's `/metrics/targets`, and `node`.

    http_host: what routers listen on; where that is every address, the node's stands here. model_name: as clients use
    it.
    """
    found = []
    for unit in units:
        if unit.lost_at is not None or not unit.pid:
            continue
        if unit.info is not None:
            group = worker_group(unit.info, model_name)
        else:
            host = unit.host if http_host in ("0.0.0.0", "::") else http_host
            labels = {"component": unit.role, "model": model_name}
            group = {"targets": [authority(host, unit.http_port)], "labels": labels}
        if group is not None:
            found.append({**group, "labels": {**group["labels"], "node": unit.host}})
    return found


def write(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """Replaces the file at once: Prometheus reads it whenever it likes."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(groups, indent=1) + "\n")
    fresh.replace(path)
