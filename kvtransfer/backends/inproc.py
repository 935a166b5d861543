"""Both ends in one process: a write is a copy. For tests and for studying the protocol."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from kvtransfer.base import Buffer, Landing, Link, TransportError
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation


class InprocLanding:
    """A slab, and the manifests of what was copied into it."""

    def __init__(self, slab_bytes: int) -> None:
        self.memory = allocate_memory(slab_bytes)
        self.token = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._manifests: list[bytes] = []
        self._closed = False

    def metadata(self) -> bytes:
        """The token under which the backend knows this landing."""
        return self.token

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """Nothing to do: this transport trusts its writer, as NIXL must."""

    def write(self, view: Buffer, offset: int, manifest: bytes) -> None:
        """The peer's write. Raises TransportError when the landing is closed or the range lies outside."""
        with self._lock:
            if self._closed or not 0 <= offset <= self.memory.nbytes - view.nbytes:
                raise TransportError(f"cannot write {view.nbytes} bytes at {offset}: landing closed or range outside")
            self.memory[offset : offset + view.nbytes] = view
            self._manifests.append(manifest)

    def poll(self) -> list[bytes]:
        """Manifests since the last call."""
        with self._lock:
            arrived, self._manifests = self._manifests, []
        return arrived

    def close(self) -> None:
        """Refuses all later writes."""
        with self._lock:
            self._closed = True


class InprocLink:
    """Copies into a landing of the same backend object."""

    def __init__(self, landings: dict[bytes, InprocLanding]) -> None:
        self._landings = landings
        self._landing: InprocLanding | None = None

    def connect(self, metadata: bytes) -> None:
        """Finds the landing. Raises TransportError when there is none of that name."""
        self._landing = self._landings.get(metadata)
        if self._landing is None:
            raise TransportError("no such landing in this process")

    def post(self, view: Buffer, offset: int, manifest: bytes) -> None:
        """Copies at once."""
        if self._landing is None:
            raise TransportError("the link is closed")
        self._landing.write(view, offset, manifest)

    def poll(self, handle: None) -> bool:
        """A posted write is complete."""
        return True

    def close(self) -> None:
        """Forgets the landing."""
        self._landing = None


class InprocBackend:
    """Give the same object to both ends."""

    name = "inproc"

    def __init__(self) -> None:
        self._landings: dict[bytes, InprocLanding] = {}

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Landing:
        """A landing that links of this object can find."""
        landing = InprocLanding(slab_bytes)
        self._landings[landing.token] = landing
        return landing

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Link:
        """A link, not yet connected."""
        return InprocLink(self._landings)
