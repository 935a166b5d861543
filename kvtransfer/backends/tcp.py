"""Plain TCP, for hosts without NIXL: one connection for each pair, opened by the sender.

The landing knows the grants in force and takes no other frame, so a peer can never write outside them. A frame is a header
(offset, length, manifest length), the manifest and the bytes, which are received straight into the slab; the landing
acknowledges each with one byte, because a sender may only say that it is done when the receiver has everything. All
sockets are non-blocking and are served by the transfer thread.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from kvtransfer.base import Buffer, Landing, Link, TransportError
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation

_TOKEN_BYTES = 32
_FRAME = struct.Struct("<QQH")
_ACK = b"\x06"
_BYTES_A_POLL = 8 << 20
_MAX_STRANGERS = 8
_STRANGER_S = 5.0
_CONNECT_S = 10.0
_SOCKET_BUFFER = 4 << 20


def _tune(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send_some(connection: socket.socket, data: memoryview) -> int:
    """Bytes taken by the socket, 0 when it is full. Raises TransportError when the connection is gone."""
    try:
        return connection.send(data)
    except (BlockingIOError, InterruptedError):
        return 0
    except OSError as error:
        raise TransportError(f"TCP: {error}") from error


def _receive_some(connection: socket.socket, into: memoryview) -> int:
    """Bytes received, 0 when there are none yet. Raises TransportError when the connection is gone."""
    try:
        count = connection.recv_into(into)
    except (BlockingIOError, InterruptedError):
        return 0
    except OSError as error:
        raise TransportError(f"TCP: {error}") from error
    if count == 0:
        raise TransportError("TCP: the peer closed the connection")
    return count


@dataclass(slots=True)
class _Stranger:
    """A connection that has not shown the token yet."""

    connection: socket.socket
    until: float
    said: bytearray = field(default_factory=bytearray)


class TcpLanding:
    """A slab, a listening socket, and one connection that showed the token."""

    def __init__(self, host: str, slab_bytes: int) -> None:
        self.memory = allocate_memory(slab_bytes)
        self._view = memoryview(self.memory).cast("B")
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener: socket.socket | None = socket.create_server((host, 0), family=family, backlog=4)
        except OSError as error:
            raise TransportError(f"TCP: cannot listen on {host}: {error}") from error
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._strangers: list[_Stranger] = []
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._allowed: set[tuple[int, int]] = set()
        self._head = bytearray()
        self._need = _FRAME.size
        self._frame: tuple[int, int] | None = None
        self._manifest = b""
        self._got = 0
        self._acks = 0
        self._closed = False

    def metadata(self) -> bytes:
        """Port, token, host."""
        return struct.pack("<H", self._port) + self._token + self._host.encode()

    def allow(self, offset: int, length: int) -> None:
        """One frame with exactly this range may come."""
        with self._lock:
            self._allowed.add((offset, length))

    def poll(self) -> list[bytes]:
        """Takes what the sockets have, at most `_BYTES_A_POLL`."""
        if self._closed:
            return []
        if self._connection is None:
            self._greet()
            if self._connection is None:
                return []
        arrived: list[bytes] = []
        budget = _BYTES_A_POLL
        while budget > 0 and (count := self._receive(arrived)):
            budget -= count
        self._acknowledge()
        return arrived

    def close(self) -> None:
        """Closes all sockets: whatever the peer sends now goes nowhere."""
        self._closed = True
        for sock in (self._listener, self._connection, *(stranger.connection for stranger in self._strangers)):
            if sock is not None:
                sock.close()
        self._listener = self._connection = None
        self._strangers.clear()

    def _greet(self) -> None:
        """Accepts connections and keeps the first that shows the token."""
        if self._listener is None:
            raise TransportError("TCP: the peer closed the connection")
        while len(self._strangers) < _MAX_STRANGERS:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise TransportError(f"TCP: {error}") from error
            _tune(connection)
            self._strangers.append(_Stranger(connection, time.monotonic() + _STRANGER_S))
        for stranger in list(self._strangers):
            if self._recognise(stranger):
                self._connection = stranger.connection
                self._strangers.remove(stranger)
                self._dismiss()
                return

    def _recognise(self, stranger: _Stranger) -> bool:
        """Whether it has shown the token; one that cannot any more is dropped."""
        buffer = bytearray(_TOKEN_BYTES - len(stranger.said))
        try:
            count = _receive_some(stranger.connection, memoryview(buffer))
        except TransportError:
            count = -1
        stranger.said += buffer[: max(0, count)]
        full = len(stranger.said) == _TOKEN_BYTES
        if full and hmac.compare_digest(bytes(stranger.said), self._token):
            return True
        if full or count < 0 or time.monotonic() > stranger.until:
            stranger.connection.close()
            self._strangers.remove(stranger)
        return False

    def _dismiss(self) -> None:
        """The peer is here: nobody else is wanted."""
        for stranger in self._strangers:
            stranger.connection.close()
        self._strangers.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _receive(self, arrived: list[bytes]) -> int:
        """One step of the frame in progress; bytes taken."""
        assert self._connection is not None
        if self._frame is None:
            buffer = bytearray(self._need - len(self._head))
            count = _receive_some(self._connection, memoryview(buffer))
            self._head += buffer[:count]
            if len(self._head) == self._need:
                self._begin()
            return count
        offset, length = self._frame
        count = _receive_some(self._connection, self._view[offset + self._got : offset + length])
        self._got += count
        if self._got == length:
            arrived.append(self._manifest)
            self._frame, self._got, self._need = None, 0, _FRAME.size
            self._head.clear()
            self._acks += 1
        return count

    def _begin(self) -> None:
        """The header is complete, and then the manifest; a frame without a grant ends the connection."""
        offset, length, manifest_length = _FRAME.unpack_from(self._head)
        if len(self._head) == _FRAME.size:
            with self._lock:
                granted = (offset, length) in self._allowed
                self._allowed.discard((offset, length))
            if not granted:
                raise TransportError(f"TCP: the peer wants to write {length} bytes at {offset} without a grant")
            self._need = _FRAME.size + manifest_length
        if len(self._head) == self._need:
            self._manifest = bytes(self._head[_FRAME.size :])
            self._frame, self._got = (offset, length), 0

    def _acknowledge(self) -> None:
        if self._acks and self._connection is not None:
            self._acks -= _send_some(self._connection, memoryview(_ACK * self._acks))


class TcpLink:
    """One connection to a landing. Frames go out in order, so the n-th acknowledgement is the n-th frame's."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._out: deque[memoryview] = deque()
        self._posted = 0
        self._acknowledged = 0

    def connect(self, metadata: bytes) -> None:
        """Connects and shows the token. Raises TransportError."""
        try:
            (port,) = struct.unpack_from("<H", metadata)
            token, host = metadata[2 : 2 + _TOKEN_BYTES], metadata[2 + _TOKEN_BYTES :].decode()
            self._connection = socket.create_connection((host, port), timeout=_CONNECT_S)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            self._connection.sendall(token)
            _tune(self._connection)
        except (OSError, ValueError, struct.error) as error:
            raise TransportError(f"TCP: cannot connect: {error}") from error

    def post(self, view: Buffer, offset: int, manifest: bytes) -> int:
        """Queues a frame and sends what the socket takes."""
        self._out.append(memoryview(_FRAME.pack(offset, view.nbytes, len(manifest)) + manifest))
        self._out.append(memoryview(view).cast("B"))
        self._posted += 1
        self._pump()
        return self._posted

    def poll(self, handle: int) -> bool:
        """Whether the frame was acknowledged."""
        if self._acknowledged < handle:
            self._pump()
            buffer = bytearray(self._posted - self._acknowledged)
            self._acknowledged += _receive_some(self._require(), memoryview(buffer))
        return self._acknowledged >= handle

    def close(self) -> None:
        """Closes the connection; what was queued is not sent."""
        self._out.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _pump(self) -> None:
        while self._out:
            count = _send_some(self._require(), self._out[0])
            if count == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][count:]
                return

    def _require(self) -> socket.socket:
        if self._connection is None:
            raise TransportError("TCP: the link is closed")
        return self._connection


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
