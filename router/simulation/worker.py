"""Simulated workers: an engine, a cache, and what they tell the router, as late as real ones do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from random import Random

from router.simulation.block_cache import BlockCache
from router.simulation.clock import Clock
from router.simulation.cores import Cores
from router.simulation.engine import Engine, Output, Prompt
from router.simulation.flight import Flight
from router.simulation.setting import Setting
from tandem.cluster import CacheEvent, EventKind, Incarnation, Role, Status, WorkerInfo, WorkerUpdate
from tandem.kv import BlockHash, KvLayout, LayerGroup, Plane
from tandem.types import ModelInfo

ROUTER_ID = "replay"
LOCAL_TOKENS = 16
"""Missing tokens that a decode worker computes itself whatever the plan says, at most."""


def layout_of(token_bytes: int) -> KvLayout:
    """Some layout of so many bytes a token, an even number."""
    half = token_bytes // 4
    return KvLayout((Plane("k", 1, half, "bfloat16"), Plane("v", 1, half, "bfloat16")), (LayerGroup((0,)),))


def worker_info(role: Role, number: int, setting: Setting) -> WorkerInfo:
    """What a simulated worker says of itself."""
    machine = setting.machine
    return WorkerInfo(
        incarnation=f"{role.value}-{number}-{setting.seed}",
        role=role,
        address=f"{role.value}-{number}",
        model=ModelInfo("simulated", "", "simulated", 1 << 17, 1 << 20, ()),
        layout=layout_of(machine.kv_bytes),
        kv_dtype="bfloat16",
        page_size=1,
        total_pages=machine.kv_tokens,
        max_batch_tokens=machine.max_batch_tokens,
        transport="nixl",
    )


class SimulatedWorker(ABC):
    """What both roles share. cores: for its steps. tell: takes an update to the router, `delay_s` later."""

    def __init__(
        self,
        role: Role,
        number: int,
        setting: Setting,
        clock: Clock,
        cores: Cores | None,
        tell: Callable[[WorkerUpdate], None],
    ) -> None:
        self.info = worker_info(role, number, setting)
        self._cores = cores
        self.cache = BlockCache(setting.cache_blocks, self._evicted, setting.pool_blocks)
        self.engine = Engine(
            clock,
            setting.machine,
            self.cache,
            setting.block_tokens,
            Random(self.info.incarnation),
            setting.noise,
            self,
            cores,
        )
        self._setting = setting
        self._clock = clock
        self._tell = tell
        self._events: list[CacheEvent] = []
        self._published = -setting.interval_s
        self._publishing = False
        self._sequence = 0

    @property
    def incarnation(self) -> Incarnation:
        """Which one."""
        return self.info.incarnation

    @abstractmethod
    def status(self) -> Status:
        """What it would report now."""

    def announce_itself(self) -> None:
        """Its first report: an empty cache."""
        self._send((), snapshot=True)

    def stored(self, hashes: tuple[BlockHash, ...], parent: BlockHash) -> None:
        """See `Host`."""
        self._events.append(CacheEvent(EventKind.STORED, hashes, parent))

    def stepped(self, milliseconds: float, tokens: int) -> None:
        """See `Host`."""
        self.poke()

    def promise(self, hashes: tuple[BlockHash, ...]) -> None:
        """Announces blocks at once; they are not stored yet."""
        if hashes:
            self._sequence += 1
            event = CacheEvent(EventKind.PROMISED, hashes)
            self._clock.after(
                self._setting.delay_s, self._tell, WorkerUpdate(self.incarnation, self._sequence, (event,))
            )

    def _evicted(self, hashes: tuple[BlockHash, ...]) -> None:
        self._events.append(CacheEvent(EventKind.EVICTED, hashes))

    def keep(self, hashes: tuple[BlockHash, ...], known: int) -> None:
        """Takes all but the first `known` blocks, which are in use, into use, too, and tells of new ones."""
        stored = self.cache.store(hashes[known:])
        if stored:
            first = hashes.index(stored[0])
            self.stored(stored, hashes[first - 1] if first else b"")

    def poke(self) -> None:
        """Something changed: reports soon, but not more often than real workers do."""
        if not self._publishing:
            self._publishing = True
            self._clock.at(self._published + self._setting.interval_s, self._publish)

    def _publish(self) -> None:
        self._publishing = False
        self._published = self._clock.now
        events, self._events = tuple(self._events), []
        self._send(events, snapshot=False)

    def _send(self, events: tuple[CacheEvent, ...], snapshot: bool) -> None:
        update = WorkerUpdate(self.incarnation, self._sequence, events, self.status(), snapshot)
        self._sequence += 1
        self._clock.after(self._setting.delay_s, self._tell, update)


class SimulatedPrefill(SimulatedWorker):
    """Computes prompts but their last token, and pushes what the decode worker lacks over one link, in turn."""

    def __init__(
        self, number: int, setting: Setting, clock: Clock, cores: Cores | None, tell: Callable[[WorkerUpdate], None]
    ) -> None:
        super().__init__(Role.PREFILL, number, setting, clock, cores, tell)
        self._free_at = 0.0
        self._moved = False

    def status(self) -> Status:
        """Writes are measured once there was one."""
        engine, machine = self.engine, self._setting.machine
        return Status(
            self.incarnation,
            engine.running,
            engine.waiting,
            engine.queued_tokens,
            machine.kv_tokens - engine.prompt_tokens,
            machine.kv_tokens,
            engine.timing,
            machine.link_bytes_per_ms if self._moved else 0.0,
        )

    def open(self, flight: Flight, landed: Callable[[Flight], None]) -> None:
        """Takes a prompt; `landed` is called when all that the decode worker lacks has arrived there."""
        tokens = flight.prompt_tokens - 1
        hashes = flight.hashes[: tokens // self._setting.block_tokens]
        pushed = flight.decode_cached

        def push(known: int) -> None:
            nonlocal pushed
            if known > pushed:
                self._write(known - pushed)
                pushed = known

        def start(cached: int) -> None:
            flight.prefill_cached, flight.computed = cached, tokens - cached
            push(cached)

        def progress(known: int) -> None:
            push(known)
            if known == tokens:
                self._clock.at(self._free_at + self._hand_over_s(), done)

        def done() -> None:
            self.cache.release(hashes)
            landed(flight)

        self.promise(hashes)
        self.engine.compute(Prompt(hashes, tokens, start, progress))
        self.poke()

    def _hand_over_s(self) -> float:
        return self._setting.machine.hand_over_ms / 1e3 * (self._cores.stretch if self._cores else 1)

    def _write(self, tokens: int) -> None:
        machine = self._setting.machine
        seconds = tokens * machine.kv_bytes / machine.link_bytes_per_ms / 1e3
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self._moved = True


class SimulatedDecode(SimulatedWorker):
    """Owns requests: reserves memory, gets their KV or computes it, samples. observe: see `Steps`."""

    def __init__(
        self,
        number: int,
        setting: Setting,
        clock: Clock,
        cores: Cores | None,
        tell: Callable[[WorkerUpdate], None],
        observe: Callable[[float, int], None],
    ) -> None:
        super().__init__(Role.DECODE, number, setting, clock, cores, tell)
        self._observe = observe
        self._open = 0
        self._fetching = 0
        self._reserved = 0
        self._wanting: deque[tuple[Flight, Callable[[], None]]] = deque()
        self._dispatched = 0

    def status(self) -> Status:
        """Sequences that wait for their KV count as waiting."""
        engine, machine = self.engine, self._setting.machine
        return Status(
            self.incarnation,
            engine.running,
            engine.waiting + self._fetching,
            engine.queued_tokens,
            machine.kv_tokens - self._reserved,
            machine.kv_tokens,
            engine.timing,
            dispatches={ROUTER_ID: self._dispatched},
        )

    def stepped(self, milliseconds: float, tokens: int) -> None:
        """Counts the time between tokens."""
        self._observe(milliseconds, tokens)
        super().stepped(milliseconds, tokens)

    def submit(self, flight: Flight, fetch: Callable[[Flight], None]) -> None:
        """Takes a request. fetch: asks its prefill worker, which is done when `arrived` is called."""
        block_tokens = self._setting.block_tokens
        held = self.cache.acquire(flight.hashes)
        flight.held = held
        flight.decode_cached = min(held * block_tokens, flight.prompt_tokens - 1)
        self._dispatched = max(self._dispatched, flight.dispatch)
        self.promise(flight.hashes)
        missing = flight.prompt_tokens - 1 - flight.decode_cached
        local = flight.prefill is None or missing <= LOCAL_TOKENS
        if flight.prefill is None and flight.alternative is not None:
            expected = flight.prompt_tokens - 1 - flight.expected_cached
            if missing > max(expected, 0) + block_tokens:
                flight.prefill, local = flight.alternative, False
        flight.local = local
        if local:
            self._reserve(flight, lambda: self._compute(flight))
        else:
            self._fetching += 1
            fetch(flight)
        self.poke()

    def arrived(self, flight: Flight) -> None:
        """All KV that was missing has come."""
        self._reserve(flight, lambda: self._landed(flight))

    def _reserve(self, flight: Flight, then: Callable[[], None]) -> None:
        self._wanting.append((flight, then))
        self._grant()

    def _grant(self) -> None:
        while self._wanting:
            flight, then = self._wanting[0]
            if self._reserved and self._reserved + flight.kv_tokens > self._setting.machine.kv_tokens:
                return
            self._wanting.popleft()
            self._reserved += flight.kv_tokens
            flight.private = -(-flight.kv_tokens // self._setting.block_tokens) - len(flight.hashes)
            self.cache.reserve(flight.private)
            then()

    def _landed(self, flight: Flight) -> None:
        self._fetching -= 1
        self.keep(flight.hashes, flight.held)
        # The last prompt token is run here; it gives the first token.
        self._generate(flight, flight.output_tokens, fresh=True)
        self.poke()

    def _compute(self, flight: Flight) -> None:
        def start(cached: int) -> None:
            flight.computed = flight.prompt_tokens - cached

        def progress(known: int) -> None:
            if known == flight.prompt_tokens:
                self.cache.release(flight.hashes[: flight.held])  # the engine holds all of them now
                flight.first()
                self._generate(flight, flight.output_tokens - 1, fresh=False)

        self.engine.compute(Prompt(flight.hashes, flight.prompt_tokens, start, progress))

    def _generate(self, flight: Flight, tokens: int, fresh: bool) -> None:
        def end() -> None:
            self._reserved -= flight.kv_tokens
            self.cache.reserve(-flight.private)
            sequence = flight.hashes + flight.arrival.output_hashes
            self.keep(sequence, len(flight.hashes))
            self.cache.release(sequence)
            flight.end()
            self._grant()
            self.poke()

        if tokens <= 0:
            end()
        else:
            context = flight.prompt_tokens + (0 if fresh else 1)
            self.engine.generate(Output(tokens, context, flight.first if fresh else _nothing, end))


def _nothing() -> None:
    """The first token came with the prompt's last chunk."""
