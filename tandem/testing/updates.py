"""A worker's updates as the bytes that a router receives, for benchmarks of what reads them."""

from __future__ import annotations

from tandem.cluster import WorkerUpdate
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2


def update_bytes(update: WorkerUpdate) -> bytes:
    """The message of an update."""
    return codec.worker_update_to_wire(update).SerializeToString()


def update_of(data: bytes) -> WorkerUpdate:
    """The update in a message."""
    return codec.worker_update_from_wire(worker_pb2.WorkerUpdate.FromString(data))
