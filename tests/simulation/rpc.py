"""gRPC over the simulated network, with the interfaces of `grpc.aio` that the project uses.

Messages are serialised as they are on a wire. A call ends as gRPC's does: with the servicer's status, with UNAVAILABLE
when its connection breaks or none can be made, with DEADLINE_EXCEEDED, or with a cancellation when the caller, or its
channel, gives it up. A servicer's task is cancelled when its caller is gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from tests.simulation.loop import NODE, Node, VirtualLoop
from tests.simulation.network import End, Network

Code = grpc.StatusCode
Tap = Callable[[str, Node, Node, str, Any, Any], None]
"""(hears, says or refuses, caller, servicer, method, message or reason, first request): as servicers do it."""


class Rpc:
    """Stands in for `grpc.aio.insecure_channel` and `grpc.aio.server`, in the process that calls them."""

    def __init__(self, loop: VirtualLoop, net: Network, tap: Tap, notice_s: float = 0.0) -> None:
        """notice_s: callers hear at most this late that their connection broke."""
        self.loop, self.net, self.tap, self.notice_s = loop, net, tap, notice_s
        self.calls = 0

    def channel(self, target: str, options: Sequence[tuple[str, Any]] = ()) -> Channel:
        """As `insecure_channel`."""
        node = NODE.get()
        assert node is not None
        return Channel(self, node, target, dict(options))

    def server(self, options: Sequence[tuple[str, Any]] = ()) -> Server:
        """As `grpc.aio.server`."""
        node = NODE.get()
        assert node is not None
        return Server(self, node, dict(options))


class Channel:
    """Connects when it is first used, and again when it is used after its connection broke and the back-off is over."""

    def __init__(self, rpc: Rpc, node: Node, target: str, options: dict[str, Any]) -> None:
        self.rpc, self.node, self.target = rpc, node, target
        self.calls: dict[int, Call] = {}
        self._first = options.get("grpc.initial_reconnect_backoff_ms", 1000) / 1000
        self._most = options.get("grpc.max_reconnect_backoff_ms", 120_000) / 1000
        self._backoff = self._first
        self._not_before = 0.0
        self._end: End | None = None
        self._connecting = False
        self._closed = False

    def unary_unary(self, path: str, *codec: Any, **more: Any) -> Callable[..., Call]:
        """A multi-callable."""
        return self._callable(path, *codec, **more)

    unary_stream = stream_stream = unary_unary

    def _callable(
        self, path: str, request_serializer: Any, response_deserializer: Any, _registered_method: bool = True
    ) -> Callable[..., Call]:
        def start(request: Any = None, timeout: float | None = None, metadata: Sequence[tuple[str, str]] = ()) -> Call:
            call = Call(self, path, request_serializer, response_deserializer, tuple(metadata or ()))
            if self._closed:
                raise grpc.aio.UsageError("Channel is closed.")
            call.begin(request, timeout)
            return call

        return start

    def use(self, call: Call) -> None:
        """Gives a call the connection, now or once there is one."""
        self.calls[call.number] = call
        if self._end is not None:
            call.connected(self._end)
        elif not self._connecting:
            if self.rpc.loop.time() < self._not_before:
                call.failed(Code.UNAVAILABLE, "connection refused lately")
                return
            self._connecting = True
            self.rpc.net.connect(self.node, self.target, self._on_connect)

    def _on_connect(self, end: End | None) -> None:
        self._connecting = False
        if end is None:
            self._not_before = self.rpc.loop.time() + self._backoff
            self._backoff = min(self._backoff * 1.6, self._most)
            self._fail_all("failed to connect")
            return
        if self._closed:
            end.close()
            return
        self._backoff = self._first
        end.receive, end.lost = self._receive, self._lost
        self._end = end
        for call in list(self.calls.values()):
            call.connected(end)

    def _receive(self, frame: tuple[Any, ...]) -> None:
        kind, number, *rest = frame
        if kind == "ping":
            assert self._end is not None
            self._end.send(("pong", 0))
        elif (call := self.calls.get(number)) is not None:
            call.receive(kind, *rest)

    def _lost(self) -> None:
        """gRPC's own thread sees it; what is called before this process hears of it may have a new connection."""
        self._end = None
        calls = list(self.calls.values())
        if not self.rpc.notice_s:
            self._fail(calls, "the connection broke")
            return
        self.calls.clear()
        self.rpc.loop.later(0.0, self.rpc.notice_s, self._fail, calls, "the connection broke", node=self.node)

    def _fail_all(self, details: str) -> None:
        self._fail(list(self.calls.values()), details)

    @staticmethod
    def _fail(calls: Sequence[Call], details: str) -> None:
        for call in calls:
            call.failed(Code.UNAVAILABLE, details)

    async def close(self, grace: float | None = None) -> None:
        """Cancels all calls."""
        self._closed = True
        for call in list(self.calls.values()):
            call.cancel()
        if self._end is not None:
            self._end.close()
            self._end = None
        await asyncio.sleep(0)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Call:
    """The caller's side of one call, of any kind."""

    def __init__(self, channel: Channel, path: str, serialise: Any, parse: Any, metadata: tuple[Any, ...]) -> None:
        channel.rpc.calls += 1
        self.number, self.path = channel.rpc.calls, path
        self._channel, self._serialise, self._parse, self._metadata = channel, serialise, parse, metadata
        self._end: End | None = None
        self._unsent: list[tuple[Any, ...]] = []
        self._inbox: deque[Any] = deque()
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._headers = False
        self._changed: list[asyncio.Future[None]] = []
        self._deadline: asyncio.TimerHandle | None = None

    def begin(self, request: Any, timeout: float | None) -> None:
        """Sends the beginning, with a request where that is all there will be."""
        loop = self._channel.rpc.loop
        payload = None if request is None else self._serialise(request)
        self._send(("open", self.number, self.path, payload, self._metadata), payload)
        if timeout is not None:
            self._deadline = loop.call_later(timeout, self._expire)
        self._channel.use(self)

    def _send(self, frame: tuple[Any, ...], payload: bytes | None = None) -> None:
        if self._end is None:
            self._unsent.append(frame)
        else:
            self._end.send(frame, 64 + len(payload or b""))

    def connected(self, end: End) -> None:
        """There is a connection."""
        self._end = end
        for frame in self._unsent:
            end.send(frame, 64 + len(frame[3] or b"") if frame[0] == "open" else 256)
        self._unsent.clear()

    def receive(self, kind: str, *rest: Any) -> None:
        """A frame of the servicer's."""
        self._headers = True
        if kind == "message":
            self._inbox.append(rest[0])
        elif kind == "status":
            self._finish(rest[0], rest[1], rest[2])
        self._wake()

    def _expire(self) -> None:
        if self._status is None:
            self._send(("cancel", self.number))
            self._finish(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", ())

    def failed(self, code: grpc.StatusCode, details: str) -> None:
        """The transport could not do it."""
        self._finish(code, details, ())

    def cancel(self) -> bool:
        """Gives the call up, here at once."""
        if self._status is not None:
            return False
        self._send(("cancel", self.number))
        self._inbox.clear()
        self._finish(Code.CANCELLED, "Locally cancelled by application!", None)
        return True

    def _finish(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        if self._status is None:
            self._status = (code, details, trailing)
            self._channel.calls.pop(self.number, None)
            if self._deadline is not None:
                self._deadline.cancel()
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            if not future.done():
                future.set_result(None)

    async def _wait(self) -> None:
        future = self._channel.rpc.loop.create_future()
        self._changed.append(future)
        try:
            await future
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _raise(self) -> None:
        assert self._status is not None
        code, details, trailing = self._status
        if trailing is None:
            raise asyncio.CancelledError
        if code is not Code.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        while self._status is None:
            await self._wait()
        self._raise()
        return self._parse(self._inbox.popleft())

    async def read(self) -> Any:
        """The next message, or EOF."""
        while not self._inbox and self._status is None:
            await self._wait()
        if self._inbox:
            return self._parse(self._inbox.popleft())
        self._raise()
        return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        """Sends one of several messages."""
        if self._status is not None:
            self._raise()
            raise asyncio.InvalidStateError("RPC already finished.")
        payload = self._serialise(message)
        self._send(("message", self.number, payload), payload)
        await asyncio.sleep(0)

    async def initial_metadata(self) -> Any:
        """Returns when the servicer has answered anything."""
        while not self._headers and self._status is None:
            await self._wait()
        return grpc.aio.Metadata()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class Server:
    """Serves the methods of the servicers that were added to it."""

    def __init__(self, rpc: Rpc, node: Node, options: dict[str, Any]) -> None:
        self.rpc, self.node = rpc, node
        self.methods: dict[str, Any] = {}
        self.keepalive_s = options.get("grpc.keepalive_time_ms", 7_200_000) / 1000
        self.keepalive_timeout_s = options.get("grpc.keepalive_timeout_ms", 20_000) / 1000
        self._addresses: list[str] = []
        self._peers: list[_Peer] = []
        self._stopped = False

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered ones are all there are."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Methods by name."""
        self.methods.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    def add_insecure_port(self, address: str) -> int:
        """Addresses are host:port; port 0 cannot be had."""
        self._addresses.append(address)
        return int(address.rsplit(":", 1)[1])

    async def start(self) -> None:
        """Listens."""
        for address in self._addresses:
            self.rpc.net.listen(address, self.node, lambda end: self._peers.append(_Peer(self, end)))

    async def stop(self, grace: float | None) -> None:
        """Takes nothing new, lets calls end for `grace` seconds, then breaks them."""
        for address in self._addresses:
            self.rpc.net.unlisten(address, self.node)
        tasks = [task for peer in self._peers for task in peer.tasks.values()]
        if tasks and grace:
            await asyncio.wait(tasks, timeout=grace)
        for peer in self._peers:
            peer.end.close()
            peer.gone()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Peer:
    """The server's side of one connection."""

    def __init__(self, server: Server, end: End) -> None:
        self.server, self.end = server, end
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._contexts: dict[int, Context] = {}
        self._heard = server.rpc.loop.time()
        end.receive, end.lost = self._receive, self.gone
        self._keep_alive()

    def _receive(self, frame: tuple[Any, ...]) -> None:
        self._heard = self.server.rpc.loop.time()
        kind, number, *rest = frame
        if kind == "open":
            context = self._contexts[number] = Context(self, number, *rest)
            task = self.tasks[number] = asyncio.get_running_loop().create_task(context.serve())
            task.add_done_callback(lambda _: (self.tasks.pop(number, None), self._contexts.pop(number, None)))
        elif kind == "cancel" and number in self.tasks:
            self._contexts[number].broken()
            self.tasks[number].cancel()
        elif kind == "message" and number in self._contexts:
            self._contexts[number].put(rest[0])

    def gone(self) -> None:
        """The caller is."""
        for number, task in list(self.tasks.items()):
            self._contexts[number].broken()
            task.cancel()

    def _keep_alive(self) -> None:
        """Pings, and breaks a connection that is silent: its other end may stand still, or the way be cut."""
        server = self.server

        def look() -> None:
            if not self.end.open:
                return
            if server.rpc.loop.time() - self._heard > server.keepalive_s + server.keepalive_timeout_s:
                self.end.close()
                self.gone()
                return
            self.end.send(("ping", 0))
            server.rpc.loop.call_later(server.keepalive_s, look)

        if server.keepalive_s < 3600:
            server.rpc.loop.call_later(server.keepalive_s, look, context=server.node.context)


class Context:
    """A servicer's context, and the requests of a stream."""

    def __init__(self, peer: _Peer, number: int, path: str, payload: bytes | None, metadata: tuple[Any, ...]) -> None:
        self._peer, self._number, self._path, self._payload, self._metadata = peer, number, path, payload, metadata
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._handler = peer.server.methods[path]
        self._asked: Any = None

    def put(self, payload: bytes) -> None:
        """A further request."""
        self._requests.put_nowait(payload)

    def broken(self) -> None:
        """No further request comes."""
        self._requests.put_nowait(None)

    def invocation_metadata(self) -> tuple[Any, ...]:
        """What the caller sent with it."""
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """Ends the call."""
        self._note("refuses", details)
        raise _Aborted(code, details, tuple(trailing_metadata))

    async def write(self, message: Any) -> None:
        """Sends one message."""
        self._note("says", message)
        payload = self._handler.response_serializer(message)
        self._peer.end.send(("message", self._number, payload), 64 + len(payload))
        await asyncio.sleep(0)

    def _note(self, what: str, message: Any) -> None:
        if what == "hears" and self._asked is None:
            self._asked = message
        end = self._peer.end
        self._peer.server.rpc.tap(what, end.peer, end.node, self._path, message, self._asked)

    async def _stream(self) -> AsyncIterator[Any]:
        while (payload := await self._requests.get()) is not None:
            request = self._handler.request_deserializer(payload)
            self._note("hears", request)
            yield request
        raise grpc.aio.BaseError("the caller is gone")

    async def serve(self) -> None:
        """Runs the servicer, and tells the caller how it ended."""
        handler, status = self._handler, (Code.OK, "", ())
        try:
            if handler.request_streaming:
                await handler.stream_stream(self._stream(), self)
            else:
                request = handler.request_deserializer(self._payload)
                self._note("hears", request)
                if handler.response_streaming:
                    async for message in handler.unary_stream(request, self):
                        await self.write(message)
                else:
                    await self.write(await handler.unary_unary(request, self))
        except _Aborted as ending:
            status = (ending.code, ending.details, ending.trailing)
        except Exception as error:  # noqa: BLE001 - as gRPC does
            self._peer.server.rpc.loop.failures.append(f"{self._peer.end.node.name}: {self._path}: {error!r}")
            status = (Code.UNKNOWN, f"Unexpected {type(error)}: {error}", ())
        self._peer.end.send(("status", self._number, *status))


class _Aborted(grpc.aio.AbortError):
    """How a servicer ended its call."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[Any, ...]) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing = code, details, trailing
