"""Where workers' metrics pages are, in the form that Prometheus asks for (`http_sd_configs`).

Workers may take any free port, and another one after a restart; their gRPC address stays. So targets are found here and
not in a list, and `instance` is that address.
"""

from __future__ import annotations

import json

from router.workers.fleet import Fleet
from tandem.ports import authority

JSON_TYPE = "application/json"


def targets(fleet: Fleet, model_name: str | None) -> bytes:
    """One group for each worker known, those that are silent too. model_name: as clients use it; None is the workers'.

    Labels: `component` (prefill or decode), `model`, and `instance`.
    """
    groups = [
        {
            "targets": [authority(worker.info.address.rpartition(":")[0].strip("[]"), worker.info.metrics_port)],
            "labels": {
                "component": worker.info.role.value,
                "model": model_name or worker.info.model.name,
                "instance": worker.info.address,
            },
        }
        for worker in fleet.known()
        if worker.info.metrics_port
    ]
    return json.dumps(groups).encode()
