"""NIXL: RDMA where the hosts have it, shared memory or TCP where they have not.

One agent for each pair on each side. On the receiver the safety of the slab rests on it: neither deregistering nor
removing the peer stops writes that were posted, destroying the agent does (measured). On the sender it bounds what a
broken peer can touch. No progress thread (it burns a core when idle); the transfer thread's polling makes progress.
"""

from __future__ import annotations

import gc
import importlib
import logging
import secrets
import struct
from collections.abc import Callable
from typing import Any

from kvtransfer.base import Buffer, Landing, Link, TransportError
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation

_HEADER = struct.Struct("<QQ")
_MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")


def _api() -> Any:
    """NIXL's Python module, whichever wheel is installed. Raises ImportError."""
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        finally:
            # NIXL's import switches off the reporting of logging errors for the whole process.
            logging.raiseExceptions = raise_exceptions
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return module
    raise ImportError("no NIXL wheel is installed")


class _Agent:
    """A NIXL agent with one registered buffer."""

    def __init__(self, api: Any, name: str, memory: Buffer) -> None:
        config = api.nixl_agent_config(
            enable_prog_thread=False, backends=["UCX"], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        try:
            self.agent = api.nixl_agent(name, config)
            if "UCX" not in self.agent.backends:
                raise TransportError("NIXL has no UCX plugin")
            address = memory.ctypes.data
            self._registered = self.agent.register_memory([(address, memory.nbytes, 0, "")], mem_type="DRAM")
        except TransportError:
            raise
        except Exception as error:
            raise TransportError(f"NIXL agent: {_text(error)}") from error

    def destroy(self) -> None:
        """Drops the last reference, which destroys the agent; the caller must have dropped all handles."""
        agent, self.agent = self.agent, None
        registered, self._registered = self._registered, None
        if agent is None:
            return
        try:
            agent.deregister_memory(registered)
        except Exception as error:  # noqa: BLE001 - the agent goes anyway
            logging.getLogger(__name__).warning("NIXL deregistration: %s", _text(error))
        del registered, agent
        gc.collect()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}"


class NixlLanding:
    """A slab registered with an agent that only one peer gets the metadata of."""

    def __init__(self, api: Any, name: str, slab_bytes: int) -> None:
        self.memory = allocate_memory(slab_bytes)
        self._agent = _Agent(api, name, self.memory)

    def metadata(self) -> bytes:
        """Address and size of the slab, then the agent's own metadata."""
        header = _HEADER.pack(self.memory.ctypes.data, self.memory.nbytes)
        return header + bytes(self._agent.agent.get_agent_metadata())

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """NIXL cannot refuse single writes; the slab as a whole is what the peer may write."""

    def poll(self) -> list[bytes]:
        """Notifications since the last call."""
        try:
            notifications = self._agent.agent.get_new_notifs()
        except Exception as error:
            raise TransportError(f"NIXL notifications: {_text(error)}") from error
        return [message for messages in notifications.values() for message in messages]

    def close(self) -> None:
        """Destroys the agent."""
        self._agent.destroy()


class NixlLink:
    """An agent that writes into one landing."""

    def __init__(self, api: Any, name: str, staging: Buffer) -> None:
        self._agent = _Agent(api, name, staging)
        self._peer = ""
        self._address = 0
        self._size = 0
        self._open: set[Any] = set()

    def connect(self, metadata: bytes) -> None:
        """Adds the landing's agent. Raises TransportError."""
        try:
            self._address, self._size = _HEADER.unpack_from(metadata)
            peer = self._agent.agent.add_remote_agent(metadata[_HEADER.size :])
        except Exception as error:
            raise TransportError(f"NIXL peer: {_text(error)}") from error
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def post(self, view: Buffer, offset: int, manifest: bytes) -> Any:
        """Starts a WRITE that carries the manifest as its notification."""
        agent, size = self._agent.agent, view.nbytes
        if not 0 <= offset <= self._size - size:
            raise TransportError(f"write of {size} bytes at {offset} lies outside the slab of {self._size}")
        try:
            local = agent.get_xfer_descs([(view.ctypes.data, size, 0)], mem_type="DRAM")
            remote = agent.get_xfer_descs([(self._address + offset, size, 0)], mem_type="DRAM")
            handle = agent.initialize_xfer("WRITE", local, remote, self._peer, manifest)
            self._open.add(handle)
            agent.transfer(handle)
        except Exception as error:
            raise TransportError(f"NIXL write: {_text(error)}") from error
        return handle

    def poll(self, handle: Any) -> bool:
        """Whether the write is complete at the receiver."""
        try:
            state = self._agent.agent.check_xfer_state(handle)
            if state == "PROC":
                return False
            self._open.discard(handle)
            self._agent.agent.release_xfer_handle(handle)
        except Exception as error:
            raise TransportError(f"NIXL write: {_text(error)}") from error
        if state != "DONE":
            raise TransportError(f"NIXL write ended as {state}")
        return True

    def close(self) -> None:
        """Releases what is open and destroys the agent."""
        for handle in self._open:
            try:
                self._agent.agent.release_xfer_handle(handle)
            except Exception as error:  # noqa: BLE001 - destroying the agent ends the write
                logging.getLogger(__name__).debug("NIXL handle of a closing link: %s", _text(error))
        self._open.clear()
        self._agent.destroy()


class NixlBackend:
    """Makes landings and links; creating it proves that an agent can be made. Raises ImportError or TransportError."""

    name = "nixl"

    def __init__(self) -> None:
        self._api = _api()
        NixlLanding(self._api, f"probe-{secrets.token_hex(8)}", 4096).close()

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Landing:
        """A landing under a name that no other pair, and no earlier landing of this pair, has."""
        return NixlLanding(self._api, f"{me}<{peer}-{secrets.token_hex(4)}", slab_bytes)

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Link:
        """A link, not yet connected."""
        return NixlLink(self._api, f"{me}>{peer}-{secrets.token_hex(4)}", staging)
