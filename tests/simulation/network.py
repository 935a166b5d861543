"""What lies between simulated processes: connections that keep order, and links that are slow, cut, or reset them.

As with TCP, nothing that was sent on a connection is lost while it stands. A link that is cut holds everything back
until it is mended; a process that is killed has its connections reset by its kernel, one that stands still keeps them.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from tests.simulation.loop import Node, VirtualLoop

CONNECT_S = 20.0
"""Seconds after which an attempt to connect without an answer is given up; gRPC's own."""

Accept = Callable[["End"], None]


class Wire:
    """What two hosts have between them."""

    def __init__(self) -> None:
        self.cut = False
        self.latency = (0.0002, 0.002)
        self.bytes_per_s = 1e9
        self.free_at = 0.0
        """When the last byte given to it is through: bandwidth is shared."""
        self.waiting: list[Callable[[], None]] = []


class End:
    """One end of a connection: `send` what the other end's `receive` gets, until `lost` is called."""

    def __init__(self, net: Network, node: Node, peer: Node) -> None:
        self.node, self.peer = node, peer
        self.other: End
        self.open = True
        self.receive: Callable[[Any], None] = lambda message: None
        self.lost: Callable[[], None] = lambda: None
        self._net = net
        self._last = 0.0

    def send(self, message: Any, size: int = 64) -> None:
        """Gives a message to the kernel."""
        if self.open:
            self._net.carry(self, lambda: self._arrive(message), size)

    def close(self) -> None:
        """Ends the connection; the other end hears of it after what was sent before."""
        if self.open:
            self.open = False
            self._net.carry(self, self.other.fail, 0)

    def _arrive(self, message: Any) -> None:
        if self.other.open:
            self.other.receive(message)

    def fail(self) -> None:
        """The connection is gone."""
        if self.open:
            self.open = False
            self.lost()

    def in_order(self, at: float) -> float:
        """The moment at which something that would arrive `at` does, behind everything before it."""
        self._last = max(at, self._last + 1e-9)
        return self._last


class Network:
    """All hosts by name, what listens at which address, and every open connection."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._world = contextvars.copy_context()
        self._wires: dict[frozenset[str], Wire] = {}
        self._listening: dict[str, tuple[Node, Accept]] = {}
        self._connections: list[tuple[End, End]] = []

    def wire(self, one: str, other: str) -> Wire:
        """What lies between two hosts."""
        return self._wires.setdefault(frozenset((one, other)), Wire())

    def listen(self, address: str, node: Node, accept: Accept) -> None:
        """Takes an address until `unlisten` or the end of the process. Raises RuntimeError while another has it."""
        holder = self._listening.get(address)
        if holder is not None and not holder[0].dead:
            raise RuntimeError(f"{address} is taken by {holder[0].name}")
        self._listening[address] = (node, accept)

    def unlisten(self, address: str, node: Node) -> None:
        """Gives it back."""
        if address in self._listening and self._listening[address][0] is node:
            del self._listening[address]

    def connect(self, node: Node, address: str, done: Callable[[End | None], None]) -> None:
        """Tries to reach an address; `done` gets the end, or None when nobody listens there or no answer comes."""
        listener = self._listening.get(address)
        settled = False

        def settle(end: End | None) -> None:
            nonlocal settled
            if not settled:
                settled = True
                done(end if end is not None and end.open else None)
            elif end is not None:
                end.close()

        self._loop.call_later(CONNECT_S, settle, None, context=node.context)
        if listener is None:
            self._loop.later(0.0002, 0.002, settle, None, node=node)
            return
        server, accept = listener
        ends = End(self, node, server), End(self, server, node)
        ends[0].other, ends[1].other = ends[1], ends[0]

        def greet() -> None:
            accept(ends[1])
            self.carry(ends[1], lambda: settle(ends[0]), 0)

        def arrive() -> None:
            if server.dead or self._listening.get(address) != listener:
                self.carry(ends[1], lambda: settle(None), 0)
            else:
                self._connections.append(ends)
                self._loop.call_soon(greet, context=server.context)

        self.carry(ends[0], arrive, 0, kernel=True)

    def carry(self, end: End, deliver: Callable[[], None], size: int, kernel: bool = False) -> None:
        """Takes something from `end` to the process on its other side, or to that one's kernel, which always runs."""
        wire = self.wire(end.node.name, end.peer.name)
        if wire.cut:
            wire.waiting.append(lambda: self.carry(end, deliver, size, kernel))
            return
        now = self._loop.time()
        through = wire.free_at = max(now, wire.free_at) + size / wire.bytes_per_s
        at = end.in_order(through + self._loop.random.uniform(*wire.latency))
        self._loop.call_at(at, deliver, context=self._world if kernel else end.peer.context)

    def mend(self, one: str, other: str) -> None:
        """Ends a cut: what waited goes on its way."""
        wire = self.wire(one, other)
        wire.cut, waiting, wire.waiting = False, wire.waiting, []
        for again in waiting:
            again()

    def reset(self, one: str, other: str) -> int:
        """Breaks every connection between two hosts; how many there were."""
        broken = 0
        for ends in self._open():
            if {ends[0].node.name, ends[1].node.name} == {one, other}:
                broken += 1
                for end in ends:
                    self._loop.call_soon(end.fail, context=end.node.context)
        return broken

    def died(self, node: Node) -> None:
        """The kernel of a process that is no more closes its connections."""
        for ends in self._open():
            for end in ends:
                if end.node is node:
                    end.close()
        for address in [address for address, (holder, _) in self._listening.items() if holder is node]:
            del self._listening[address]

    def _open(self) -> list[tuple[End, End]]:
        self._connections = [ends for ends in self._connections if ends[0].open or ends[1].open]
        return list(self._connections)
