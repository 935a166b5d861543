"""Plain TCP, for hosts without NIXL: one connection for each pair, opened by the sender, a small thread at each end.

A frame is a header (offset, length, manifest length), the manifest and the bytes, which are received straight into the
slab. The landing takes no frame without a grant in force, so a peer can never write outside them, and acknowledges each
with one byte: a sender may say that it is done only when the receiver has everything.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

from kvtransfer.base import Buffer, Landing, Link, TransportError
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation

_TOKEN_BYTES = 32
_FRAME = struct.Struct("<QQH")
_ACK = b"\x06"
_STRANGER_S = 1.0
_CONNECT_S = 10.0
_SOCKET_BUFFER = 4 << 20


def _receive(connection: socket.socket, into: memoryview) -> None:
    """Fills `into`. Raises OSError."""
    while len(into):
        count = connection.recv_into(into)
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        into = into[count:]


def _hang_up(connection: socket.socket) -> None:
    """Closes a socket and wakes the thread that waits for it."""
    with contextlib.suppress(OSError):  # not connected any more
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class TcpLanding:
    """A slab, a port, and the one connection that shows the token."""

    def __init__(self, host: str, slab_bytes: int) -> None:
        self.memory = allocate_memory(slab_bytes)
        self._token, self._host = secrets.token_bytes(_TOKEN_BYTES), host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=4)
        except OSError as error:
            raise TransportError(f"TCP: cannot listen on {host}: {error}") from error
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        self._port = self._socket.getsockname()[1]
        self._allows: Callable[[int, int], bool] = lambda offset, length: False
        self._arrived: deque[bytes] = deque()
        self._violation, self._closed, self._lock = "", False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="transfer-landing", daemon=True)
        self._thread.start()

    def metadata(self) -> bytes:
        """Port, token, host."""
        return struct.pack("<H", self._port) + self._token + self._host.encode()

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """Only frames that `allows(offset, length)` are taken."""
        self._allows = allows

    def poll(self) -> list[bytes]:
        """Manifests of complete frames. A lost connection is no error here: the sender notices, and says so."""
        if self._violation:
            raise TransportError(self._violation)
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def close(self) -> None:
        """Closes the sockets and waits for the thread: whatever the peer sends now goes nowhere."""
        with self._lock:
            self._closed = True
            _hang_up(self._socket)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while not self._greet():
                pass
            while not self._violation:
                self._frame()
        self._socket.close()

    def _greet(self) -> bool:
        """Accepts a connection and keeps it, instead of the listening socket, if it shows the token."""
        connection, _ = self._socket.accept()
        token = bytearray(_TOKEN_BYTES)
        connection.settimeout(_STRANGER_S)
        with contextlib.suppress(OSError):
            _receive(connection, memoryview(token))
        with self._lock:
            if self._closed or not hmac.compare_digest(bytes(token), self._token):
                connection.close()
                return False
            listener, self._socket = self._socket, connection
        listener.close()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def _frame(self) -> None:
        head = bytearray(_FRAME.size)
        _receive(self._socket, memoryview(head))
        offset, length, manifest_length = _FRAME.unpack(head)
        if offset + length > self.memory.nbytes or not self._allows(offset, length):
            self._violation = f"TCP: the peer wants to write {length} bytes at {offset} without a grant"
            return
        manifest = bytearray(manifest_length)
        _receive(self._socket, memoryview(manifest))
        _receive(self._socket, self.memory[offset : offset + length].data)
        self._arrived.append(bytes(manifest))
        self._socket.sendall(_ACK)


class TcpLink:
    """One connection to a landing; its thread sends a frame and waits for the acknowledgement, one after the other."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._frames: queue.SimpleQueue[tuple[bytes, Buffer] | None] = queue.SimpleQueue()
        self._posted = self._done = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="transfer-link", daemon=True)

    def connect(self, metadata: bytes) -> None:
        """Connects and shows the token. Raises TransportError."""
        self._socket.close()
        try:
            (port,) = struct.unpack_from("<H", metadata)
            token, host = metadata[2 : 2 + _TOKEN_BYTES], metadata[2 + _TOKEN_BYTES :].decode()
            self._socket = socket.create_connection((host, port), timeout=_CONNECT_S)
            self._socket.settimeout(None)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(token)
        except (OSError, ValueError, struct.error) as error:
            raise TransportError(f"TCP: cannot connect: {error}") from error
        self._thread.start()

    def post(self, view: Buffer, offset: int, manifest: bytes) -> int:
        """Queues a frame."""
        self._frames.put((_FRAME.pack(offset, view.nbytes, len(manifest)) + manifest, view))
        self._posted += 1
        return self._posted

    def poll(self, handle: int) -> bool:
        """Whether the frame was acknowledged."""
        if self._done < handle and self._error:
            raise TransportError(self._error)
        return self._done >= handle

    def close(self) -> None:
        """Closes the connection and waits for the thread, which then reads the staging no more."""
        self._error = "TCP: the link is closed"
        _hang_up(self._socket)
        self._frames.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        ack = memoryview(bytearray(1))
        try:
            while (frame := self._frames.get()) is not None:
                self._socket.sendall(frame[0])
                self._socket.sendall(frame[1].data)
                _receive(self._socket, ack)
                self._done += 1
        except OSError as error:
            self._error = self._error or f"TCP: {error}"


class TcpBackend:
    """host: the address that landings listen on and announce to their peer."""

    name = "tcp"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Landing:
        """A landing with a port and a token of its own."""
        return TcpLanding(self._host, slab_bytes)

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Link:
        """A link, not yet connected."""
        return TcpLink()
