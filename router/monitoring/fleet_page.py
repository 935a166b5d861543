"""The fleet as this router sees it, one worker after the other: for `tandem top` and `tandem doctor --cluster`."""

from __future__ import annotations

import json
from typing import Any

from router.monitoring.targets import metrics_address
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from tandem.cluster import MoveStat
from tandem.config import RouterConfig
from tandem.kv import HashRoot


def fleet_page(config: RouterConfig, fleet: Fleet) -> bytes:
    """As JSON: all workers known, those that are silent too, and every pair that moved KV."""
    reference = fleet.reference
    root = None if reference is None else HashRoot(
        config.cluster_key, reference.model.fingerprint, reference.kv_dtype
    )  # fmt: skip
    said = {
        "object": "tandem.fleet",
        "router": fleet.router_id,
        "policy": config.policy,
        "lease_s": fleet.lease_s,
        "hash_root": "" if root is None else root.digest().hex(),
        "workers": [_worker(worker) for worker in fleet.known()],
        "pairs": [_pair(move) for move in fleet.moves()],
    }
    return json.dumps(said).encode()


def _worker(worker: Worker) -> dict[str, Any]:
    info, status = worker.info, worker.status
    return {
        "incarnation": info.incarnation,
        "address": info.address,
        "role": info.role.value,
        "state": "silent" if not worker.usable else "draining" if worker.view().draining else "ready",
        "model": info.model.name,
        "transport": info.transport,
        "metrics": metrics_address(info),
        "running": status.running,
        "waiting": status.waiting,
        "queued_tokens": status.queued_tokens,
        "free_pages": status.free_pages,
        "total_pages": status.total_pages,
    }


def _pair(move: MoveStat) -> dict[str, Any]:
    return {
        "sender": move.sender,
        "receiver": move.receiver,
        "transport": move.transport,
        "bytes": move.bytes,
        "seconds": move.seconds,
        "tickets": move.tickets,
        "failures": move.failures,
    }
