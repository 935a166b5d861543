"""Where workers' metrics pages are, in the form that Prometheus asks for (`http_sd_configs`).

Workers may take any free port, and another one after a restart; their gRPC address stays. So targets are found here and
not in a list, and `instance` is that address.
"""

from __future__ import annotations

import json
from typing import Any

from router.workers.fleet import Fleet
from tandem.cluster import WorkerInfo
from tandem.ports import authority

JSON_TYPE = "application/json"


def targets(fleet: Fleet, model_name: str | None) -> bytes:
    """One group for each worker known, those that are silent too.

    model_name: as clients use it; None is the workers'.
    """
    groups = (worker_group(worker.info, model_name) for worker in fleet.known())
    return json.dumps([group for group in groups if group is not None]).encode()


def worker_group(info: WorkerInfo, model_name: str | None) -> dict[str, Any] | None:
    """A worker's group: its page, and the labels `component` (prefill or decode), `model` and `instance`.

    None where it has no page.
    """
    page = metrics_address(info)
    labels = {"component": info.role.value, "model": model_name or info.model.name, "instance": info.address}
    return None if page is None else {"targets": [page], "labels": labels}


def metrics_address(info: WorkerInfo) -> str | None:
    """host:port of a worker's metrics page, at the host of its gRPC address; None where it has no page."""
    host = info.address.rpartition(":")[0].strip("[]")
    return authority(host, info.metrics_port) if info.metrics_port else None
