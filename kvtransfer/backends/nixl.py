"""NIXL: RDMA where the hosts have it, shared memory or TCP where they have not.

One agent for each pair on each side. On the receiver the safety of the slab rests on it: neither deregistering nor
removing the peer stops writes that were posted, destroying the agent does - but for one: over shared memory the kernel
copies straight into the receiver's addresses, and a sender that was stopped inside that copy finishes it whenever it
goes on (measured: half of a 1 MiB write, after the agent was destroyed). So the memory of a slab is never given back to
the process; it serves as a slab again, where digests catch what does not belong there.

On the sender an agent bounds what a broken peer can touch. There is no progress thread (it burns a core when idle); the
transfer thread's polling makes progress.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import secrets
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from kvtransfer.base import Buffer, Landing, Link, TransportError
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation

_HEADER = struct.Struct("<QQ")
_MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")


def _import() -> Any:
    """NIXL's Python module, whichever wheel is installed. Raises ImportError."""
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            # Its import makes it talkative and silences errors of logging for the whole process.
            logging.getLogger("nixl").setLevel(logging.WARNING)
            logging.raiseExceptions = raise_exceptions
            return module
    raise ImportError("no NIXL wheel is installed")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """NIXL's many exceptions as one."""
    try:
        yield
    except TransportError:
        raise
    except Exception as error:
        raise TransportError(f"NIXL {what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


class _End:
    """An agent of its own, with one registered buffer."""

    def __init__(self, api: Any, name: str, memory: Buffer) -> None:
        self.memory = memory
        mode = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"], sync_mode=mode)
        with _explained("agent"):
            self._agent = api.nixl_agent(name, config)
            if "UCX" not in self._agent.backends:
                raise TransportError("NIXL has no UCX plugin")
            region = (memory.ctypes.data, memory.nbytes, 0, "")
            self._registered = self._agent.register_memory([region], mem_type="DRAM")

    def close(self) -> None:
        """Destroys the agent, by dropping the last reference to it."""
        if self._agent is not None:
            try:
                self._agent.deregister_memory(self._registered)
            except Exception as error:  # noqa: BLE001 - the agent goes anyway
                logging.getLogger(__name__).warning("NIXL deregistration: %s", error)
        self._registered = self._agent = None


class NixlLanding(_End):
    """A slab registered with an agent that only one peer gets the metadata of. Once closed, `reuse` gets the slab."""

    def __init__(self, api: Any, name: str, memory: Buffer, reuse: Callable[[Buffer], None]) -> None:
        super().__init__(api, name, memory)
        self._reuse = reuse

    def metadata(self) -> bytes:
        """Address and size of the slab, then the agent's own metadata."""
        header = _HEADER.pack(self.memory.ctypes.data, self.memory.nbytes)
        return header + bytes(self._agent.get_agent_metadata())

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """NIXL cannot refuse single writes; the slab as a whole is what the peer may write."""

    def poll(self) -> list[bytes]:
        """Notifications since the last call."""
        with _explained("notifications"):
            return [message for messages in self._agent.get_new_notifs().values() for message in messages]

    def close(self) -> None:
        """Destroys the agent."""
        if self._agent is not None:
            super().close()
            self._reuse(self.memory)


class NixlLink(_End):
    """An agent that writes into one landing."""

    def __init__(self, api: Any, name: str, staging: Buffer) -> None:
        super().__init__(api, name, staging)
        self._peer, self._address, self._size = "", 0, 0
        self._open: set[Any] = set()

    def connect(self, metadata: bytes) -> None:
        """Adds the landing's agent."""
        with _explained("peer"):
            self._address, self._size = _HEADER.unpack_from(metadata)
            peer = self._agent.add_remote_agent(metadata[_HEADER.size :])
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def post(self, view: Buffer, offset: int, manifest: bytes) -> Any:
        """Starts a WRITE that carries the manifest as its notification."""
        size = view.nbytes
        if not 0 <= offset <= self._size - size:
            raise TransportError(f"write of {size} bytes at {offset} lies outside the slab of {self._size}")
        with _explained("write"):
            local = self._agent.get_xfer_descs([(view.ctypes.data, size, 0)], mem_type="DRAM")
            remote = self._agent.get_xfer_descs([(self._address + offset, size, 0)], mem_type="DRAM")
            handle = self._agent.initialize_xfer("WRITE", local, remote, self._peer, manifest)
            self._open.add(handle)
            self._agent.transfer(handle)
        return handle

    def poll(self, handle: Any) -> bool:
        """Whether the write is complete at the receiver."""
        with _explained("write"):
            state = self._agent.check_xfer_state(handle)
            if state == "PROC":
                return False
            self._open.discard(handle)
            self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransportError(f"NIXL write ended as {state}")
        return True

    def close(self) -> None:
        """Releases what is open, as far as that goes, and destroys the agent."""
        for handle in self._open:
            with contextlib.suppress(Exception):  # destroying the agent ends the write
                self._agent.release_xfer_handle(handle)
        self._open.clear()
        super().close()


class NixlBackend:
    """Makes landings and links; creating it proves that an agent can be made. Raises ImportError or TransportError."""

    name = "nixl"

    def __init__(self) -> None:
        self._api = _import()
        self._slabs: defaultdict[int, deque[Buffer]] = defaultdict(deque)
        self.landing("probe", "probe", 4096).close()

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Landing:
        """A landing under a name that no other pair, and no earlier landing of this pair, has."""
        slabs = self._slabs[slab_bytes]
        try:
            memory = slabs.pop()
        except IndexError:
            memory = allocate_memory(slab_bytes)
        try:
            return NixlLanding(self._api, f"{me}<{peer}-{secrets.token_hex(4)}", memory, slabs.append)
        except BaseException:
            slabs.append(memory)  # an earlier peer may still finish a write into it
            raise

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Link:
        """A link, not yet connected."""
        return NixlLink(self._api, f"{me}>{peer}-{secrets.token_hex(4)}", staging)
