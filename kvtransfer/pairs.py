"""A receiver's pairs: one for each sender incarnation, connected when it is first needed, and made anew when broken."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvtransfer.base import MIB, Backend, Hooks, Identity
from kvtransfer.inbound import InboundSettings, PairClient
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from tandem.cluster import Incarnation, new_id
from tandem.errors import Overloaded, TandemError
from tandem.obs import tell_request

log = logging.getLogger(__name__)

PROBE_SLAB_MIB = 8.0
"""Large enough for the bulk path, small enough to be no burden; less where slabs are smaller."""
PROBE_WRITES = 5

MakePair = Callable[[Incarnation, str], PairClient]
"""(incarnation, address) -> a pair not yet connected."""


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that KV is fetched from."""

    incarnation: Incarnation
    address: str


def pair_maker(
    me: Identity, backend: Backend, thread: TransferThread, budget: SlabBudget, settings: InboundSettings, hooks: Hooks
) -> MakePair:
    """Makes the pairs of one receiver."""

    def make(incarnation: Incarnation, address: str) -> PairClient:
        clock = asyncio.get_running_loop().time
        return PairClient(me, address, incarnation, backend, thread, budget, settings, hooks, clock)

    return make


def probe_pair_maker(
    me: Identity, backend: Backend, thread: TransferThread, budget: SlabBudget, settings: InboundSettings
) -> MakePair:
    """Makes pairs under incarnations of their own, to measure with: those that requests use are not touched."""
    large = min(PROBE_SLAB_MIB, settings.slab_mib)
    settings = replace(settings, slab_mib=large, warm_bytes=int(large * MIB), warm_writes=PROBE_WRITES)

    def make(incarnation: Incarnation, address: str) -> PairClient:
        stranger = replace(me, incarnation=new_id())
        return pair_maker(stranger, backend, thread, budget, settings, Hooks())(incarnation, address)

    return make


class PairPool:
    """All methods run on the event loop. Close it before the transfer thread.

    Where the slabs' cap allows fewer pairs than there are senders, the idle pair that was used longest ago makes room
    for one that a request needs.
    """

    def __init__(self, make_pair: MakePair) -> None:
        self._make_pair = make_pair
        self._pairs: dict[Incarnation, PairClient] = {}
        """The one used last is the last."""
        self._over: list[PairClient] = []
        """Closed, and not destroyed yet: their slabs are still charged."""
        self._connecting: dict[Incarnation, asyncio.Task[PairClient]] = {}
        self._warming: set[asyncio.Task[None]] = set()

    def discovered(self, workers: Sequence[tuple[Incarnation, str]]) -> None:
        """Warms pairs with workers that a router named, so that no request pays for the first connection."""
        for incarnation, address in workers:
            if incarnation not in self._pairs and incarnation not in self._connecting:
                task = asyncio.create_task(self._warm(Target(incarnation, address)))
                self._warming.add(task)
                task.add_done_callback(self._warming.discard)

    async def _warm(self, target: Target) -> None:
        try:
            await self.pair(target, needed=False)
        except TandemError as error:
            log.info("worker %s is not reachable yet: %s", target.address, error)

    async def pair(self, target: Target, needed: bool = True) -> PairClient:
        """The pair, connected; if needed, at the cost of an idle one. Raises Fenced, Overloaded, Unavailable."""
        if (pair := self._pairs.pop(target.incarnation, None)) is not None:
            self._pairs[target.incarnation] = pair
            if not pair.closed:
                return pair
        task = self._connecting.get(target.incarnation)
        if task is None:
            task = self._connecting[target.incarnation] = asyncio.create_task(self._connect(target, needed))
            task.add_done_callback(lambda _: self._connecting.pop(target.incarnation, None))
        # One request giving up must not end a connection that others wait for.
        return await asyncio.shield(task)

    async def _connect(self, target: Target, needed: bool) -> PairClient:
        tell_request("")  # it outlives the request that came first, whose id and trace are none of its own
        pair = self._make_pair(target.incarnation, target.address)
        try:
            await self._open(pair, needed)
        except asyncio.CancelledError:
            await pair.close()  # nobody else knows of it
            raise
        finally:
            # A pair that is over, of a worker that was restarted perhaps, is known until its slab has come back.
            known = [*self._over, *self._pairs.values(), pair]
            self._over = [each for each in known if each.closed and each.leaks()]
            self._pairs = {each.peer: each for each in known if not each.reason}
        return pair

    async def _open(self, pair: PairClient, needed: bool) -> None:
        try:
            await pair.connect()
        except Overloaded:
            idle = next((each for each in self._pairs.values() if not each.closed and not each.leaks()), None)
            if pair.closed or not needed or idle is None:
                raise
            log.info("the pair with %s is closed: its slab is needed for another", idle.peer)
            await idle.close()
            await self._open(pair, needed)

    async def close(self) -> None:
        """Closes every pair; `leaks` tells of those that cannot be destroyed."""
        pending = [*self._connecting.values(), *self._warming]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self._over += self._pairs.values()
        self._pairs.clear()
        await asyncio.gather(*(pair.close() for pair in self._over))

    def leaks(self) -> list[str]:
        """Tickets, grants and ranges still out."""
        return [leak for pair in [*self._over, *self._pairs.values()] for leak in pair.leaks()]
