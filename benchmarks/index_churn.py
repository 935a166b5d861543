"""The index and the load ledgers over a million synthetic requests to workers that come, restart and go.

    python -m benchmarks.index_churn --requests 1000000

Workers have caches that evict leaf first; now and then one restarts at its address with nothing. Every match is
checked: no worker that is gone is named, and none for blocks that it neither has nor was asked to compute. At the end
nothing is in flight, and the memory of the process has not grown since the index was full.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter, OrderedDict, deque
from typing import Annotated

import typer

from benchmarks.index_workload import resident
from router.cache.prefix_index import PrefixIndex
from router.cache.tails import TailMemory
from router.workers.load import Booking
from router.workers.members import Member, Members
from router.workers.snapshot import Load
from tandem.cluster import CacheEvent, EventKind, Role, Status, WorkerUpdate, new_id
from tandem.kv import BlockHash
from tandem.testing.workers import fake_info

ROUTER = "r" * 32
IN_FLIGHT = 40
TALKS = 1500
"""Conversations at a time."""
LONGEST = 40
"""Blocks after which a conversation ends."""
RESTART = 1 / 3000
"""Chance of a worker's restart, a request."""

app = typer.Typer(add_completion=False)


class Worker(Member):
    """A worker's cache: what it tells of it, and what may be believed of it."""

    def __init__(self, address: str, capacity: int, fleet: Members[Worker]) -> None:
        info = fake_info(Role.DECODE, address, incarnation=new_id())
        super().__init__(info, fleet.booking_closed, time.monotonic())
        self.asked: Counter[BlockHash] = Counter()
        """Blocks of requests under way."""
        self._capacity = capacity
        self._cache: OrderedDict[BlockHash, None] = OrderedDict()
        self._sequence = 0

    def may_have(self, block: BlockHash) -> bool:
        """Whether a match of the block is right."""
        return block in self._cache or block in self.asked

    def update(self, events: list[CacheEvent], dispatch: int, snapshot: bool = False) -> WorkerUpdate:
        """Its next message."""
        self._sequence += 1
        status = Status(self.incarnation, dispatches={ROUTER: dispatch})
        return WorkerUpdate(self.incarnation, self._sequence, tuple(events), status, snapshot)

    def compute(self, hashes: list[BlockHash]) -> list[CacheEvent]:
        """Serves a prompt: what it stores, and what that evicts."""
        known = next((at for at, block in enumerate(hashes) if block not in self._cache), len(hashes))
        for block in reversed(hashes):  # the first block is the youngest: leaves go first
            self._cache[block] = None
            self._cache.move_to_end(block)
        gone = []
        while len(self._cache) > self._capacity:
            gone.append(self._cache.popitem(last=False)[0])
        events = [CacheEvent(EventKind.STORED, tuple(hashes[known:]), hashes[known - 1] if known else b"")]
        return events + ([CacheEvent(EventKind.EVICTED, tuple(gone))] if gone else [])


class Churn:
    """The router's knowledge of some workers under load."""

    def __init__(self, workers: int, capacity: int, max_blocks: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._now = 0.0
        self.index = PrefixIndex(max_blocks, 3600.0, lambda: self._now)
        self.tails = TailMemory(4096, lambda: self._now)
        self.fleet: Members[Worker] = Members(ROUTER, self.index, lambda: self._now)
        self._capacity = capacity
        self._workers: dict[str, Worker] = {}
        self._systems = [self._blocks(8) for _ in range(20)]
        self._talks = [list(self._rng.choice(self._systems)) for _ in range(TALKS)]
        self._under_way: deque[tuple[Booking, list[BlockHash]]] = deque()
        self.restarts = 0
        self.hits = 0
        for place in range(workers):
            self._join(f"10.0.0.{place}:8100")

    def _blocks(self, count: int) -> list[BlockHash]:
        return [self._rng.randbytes(16) for _ in range(count)]

    def _join(self, address: str) -> None:
        worker = Worker(address, self._capacity, self.fleet)
        self._workers[address] = worker
        self.fleet.add(worker)
        self.fleet.observe(worker, worker.update([], 0, snapshot=True))

    def _restart(self, address: str) -> None:
        """The process ends; another one starts at its address."""
        old = self._workers[address]
        self.fleet.remove(old)
        self.tails.drop(old.incarnation)
        self._join(address)
        self.restarts += 1

    def request(self) -> None:
        """One request: matched, sent, and some older one answered."""
        rng = self._rng
        self._now += 0.002
        if rng.random() < RESTART:
            self._restart(rng.choice(list(self._workers)))
        place = rng.randrange(TALKS)
        if len(self._talks[place]) > LONGEST:
            self._talks[place] = list(rng.choice(self._systems))
        hashes = self._talks[place]
        hashes += self._blocks(rng.randint(1, 6))
        worker = self._checked(hashes)
        booking = self.fleet.book(worker.incarnation, Load(prefill_tokens=64), hashes)
        assert booking is not None
        worker.asked.update(hashes)
        self._under_way.append((booking, list(hashes)))
        if len(self._under_way) > IN_FLIGHT:
            self._answer()

    def _checked(self, hashes: list[BlockHash]) -> Worker:
        """Where it goes: mostly where the longest prefix is."""
        found = self.index.match(hashes)
        for name, blocks in found.items():
            named = self.fleet.worker(name)
            assert named is not None, "a worker that is gone is named"
            assert named.may_have(hashes[blocks - 1]), "a hit for blocks that it does not have"
            self.hits += blocks
        if found and self._rng.random() < 0.8:
            best = self.fleet.worker(max(found, key=lambda name: found[name]))
            assert best is not None
            return best
        return self._rng.choice(list(self._workers.values()))

    def _answer(self) -> None:
        """The oldest request's worker answers, refuses it, or is not there any more."""
        booking, hashes = self._under_way.popleft()
        worker = self.fleet.worker(booking.incarnation)
        if worker is None:
            assert not self.fleet.release(booking), "a dead worker's booking is still open"
            return
        for block in hashes:
            worker.asked[block] -= 1
            if not worker.asked[block]:
                del worker.asked[block]
        if self._rng.random() < 0.05:
            self.fleet.release(booking)
            return
        events = [CacheEvent(EventKind.PROMISED, tuple(hashes)), *worker.compute(hashes)]
        if self._rng.random() < 0.05:  # a promise that is not kept
            more = tuple(self._blocks(3))
            promised = CacheEvent(EventKind.PROMISED, more, hashes[-1])
            events += [promised, CacheEvent(EventKind.WITHDRAWN, more)]
        events.append(CacheEvent(EventKind.WITHDRAWN, tuple(hashes)))  # as every request ends
        self.fleet.observe(worker, worker.update(events, booking.number))
        self.tails.add(worker.incarnation, hashes[-1], (1, 2, 3))

    def finish(self) -> None:
        """Answers all that is under way; raises AssertionError when anything is left."""
        while self._under_way:
            self._answer()
        for worker in self._workers.values():
            self.fleet.observe(worker, worker.update([], 1 << 40))
            worker.ledger.check_integrity()
            assert worker.ledger.pending == Load(), "load is left"
        assert self.fleet.bookings() == len(self.index.predictions) == 0
        self.index.check_integrity()
        self.tails.check_integrity()


@app.command()
def main(
    requests: Annotated[int, typer.Option(min=100)] = 1_000_000,
    workers: Annotated[int, typer.Option(min=2)] = 64,
    capacity: Annotated[int, typer.Option(help="blocks of a worker's cache")] = 2500,
    max_blocks: Annotated[int, typer.Option(help="blocks that the index keeps")] = 60_000,
    seed: int = 1,
) -> None:
    """Prints memory as it goes, and a verdict."""
    churn = Churn(workers, capacity, max_blocks, seed)
    sizes = []
    for number in range(1, requests + 1):
        churn.request()
        if number % (requests // 10) == 0:
            sizes.append(resident() >> 10)
            line = {"requests": number, "resident_kib": sizes[-1], "blocks": len(churn.index)}
            line |= {"nodes": churn.index.nodes, "restarts": churn.restarts, "hit_blocks": churn.hits}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    churn.finish()
    growth = max(sizes[3:]) / sizes[2] - 1
    sys.stdout.write(json.dumps({"growth_after_30_percent": round(growth, 4), "in_flight": 0}) + "\n")


if __name__ == "__main__":
    app()
