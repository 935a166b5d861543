"""A file for Prometheus' `file_sd_configs` that names every metrics page of a cluster on Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.cli.on_ray.processes import Unit
from tandem.ports import authority


def targets(units: Sequence[Unit], http_host: str) -> list[dict[str, Any]]:
    """One group for each process that stands, with labels `role`, `process` and `node`.

    http_host: what routers listen on; where that is every address, the node's stands here.
    """
    found = []
    for unit in units:
        if unit.lost_at is not None or not unit.pid:
            continue
        if unit.role == "router":
            host, port = unit.host if http_host in ("0.0.0.0", "::") else http_host, unit.http_port
        else:
            host, port = unit.host, unit.info.metrics_port if unit.info is not None else 0
        labels = {"role": unit.role, "process": unit.name, "node": unit.host}
        found.append({"targets": [authority(host, port)], "labels": labels})
    return found


def write(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """Replaces the file at once: Prometheus reads it whenever it likes."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(groups, indent=1) + "\n")
    fresh.replace(path)
