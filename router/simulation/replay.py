"""The real router code in front of simulated workers: one load, one policy, one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from router.admission.gate import Admission
from router.cache.prefix_index import PrefixIndex
from router.placement import book
from router.policies import Policy, RequestInfo
from router.simulation.clock import Clock
from router.simulation.cores import Cores
from router.simulation.flight import Flight
from router.simulation.setting import Arrival, Setting
from router.simulation.worker import ROUTER_ID, SimulatedDecode, SimulatedPrefill, SimulatedWorker
from router.workers.members import Member, Members
from router.workers.snapshot import Load
from tandem.cluster import Incarnation, WorkerUpdate

INDEX_BLOCKS = 4_000_000
INDEX_AGE_S = 14_400.0
SETTLE_S = 0.5
"""Workers report this long before the first request comes."""


class Replay:
    """One run. `run` once, then read `flights` and the workers."""

    def __init__(self, setting: Setting, policy: Policy, load: Sequence[Arrival]) -> None:
        self.clock = Clock()
        self.setting = setting
        self.plan_s: list[float] = []
        """Real time that each plan took: index, snapshot and policy."""
        self.steps: list[tuple[float, float, int]] = []
        """When a decode worker's steps ended, the milliseconds of each, and the tokens that sequences got."""
        self.index = PrefixIndex(INDEX_BLOCKS, INDEX_AGE_S, self.clock)
        self.members: Members[Member] = Members(ROUTER_ID, self.index, self.clock)
        self.admission = Admission(setting.max_inflight, 0, 0.0, lambda: math.inf, self.clock)
        self._policy = policy
        machine = setting.machine
        shared = (machine.background_cores, machine.crowding, machine.contention)
        self.cores = Cores(self.clock, setting.slots, *shared) if setting.slots else None
        basis = (setting, self.clock, self.cores, self._hear)
        self.prefill = [SimulatedPrefill(number, *basis) for number in range(setting.prefill)]
        self.decode = [SimulatedDecode(number, *basis, self._step) for number in range(setting.decode)]
        self._prefill_by_name = {worker.incarnation: worker for worker in self.prefill}
        self._decode_by_name = {worker.incarnation: worker for worker in self.decode}
        self.flights = [
            Flight(number, arrival, self.clock, self._first, self._end) for number, arrival in enumerate(load)
        ]
        self.window = _window(load)
        """From the first to the last reported arrival."""
        self.busy: list[dict[Incarnation, float]] = []
        """Seconds that each prefill worker had computed, at both ends of the window."""

    def run(self) -> None:
        """All of it, in virtual time."""
        workers: list[SimulatedWorker] = [*self.prefill, *self.decode]
        for worker in workers:
            self.members.add(Member(worker.info, self.members.booking_closed, 0.0))
            worker.announce_itself()
        for flight in self.flights:
            self.clock.at(SETTLE_S + flight.arrival.at, self._ask, flight)
        for end in self.window:
            self.clock.at(SETTLE_S + end, self._note_busy)
        self.clock.run()

    def _note_busy(self) -> None:
        self.busy.append({worker.incarnation: worker.engine.busy_s for worker in self.prefill})

    def _step(self, milliseconds: float, tokens: int) -> None:
        self.steps.append((self.clock.now - SETTLE_S, milliseconds, tokens))
        self._spend(tokens * self.setting.machine.token_cpu_ms, _nothing)

    # The router -----------------------------------------------------------------------------------------------------

    def _hear(self, update: WorkerUpdate) -> None:
        member = self.members.worker(update.incarnation)
        if member is not None:
            self.members.observe(member, update)

    def _ask(self, flight: Flight) -> None:
        flight.arrived_at = self.clock.now
        machine = self.setting.machine
        if not machine.overhead_ms:
            self._arrive(flight)
            return
        overhead = machine.overhead_ms * (self.cores.stretch if self.cores else 1)
        worked = min(machine.request_cpu_ms, overhead)
        waited = partial(self.clock.after, (overhead - worked) / 1e3, self._arrive, flight)
        self._spend(worked, waited)

    def _spend(self, cpu_ms: float, then: Callable[[], None]) -> None:
        """Work on the machine's cores, where they are shared; else it takes no time."""
        if self.cores is None or not cpu_ms:
            then()
        else:
            self.cores.run(cpu_ms / 1e3, then)

    def _arrive(self, flight: Flight) -> None:
        request_id = f"{self.setting.seed}-{flight.number}"
        if not self.admission.enter_at_once(request_id):
            flight.rejected = True
            return
        began = time.perf_counter()
        block_tokens = self.setting.block_tokens
        request = RequestInfo(request_id, flight.prompt_tokens, self.setting.max_tokens, 1, flight.number)
        matches = {name: count * block_tokens for name, count in self.index.match(flight.hashes).items()}
        plan = self._policy.plan(request, self.members.snapshot(), matches, self.clock.now)
        self.plan_s.append(time.perf_counter() - began)
        self.admission.placed(request_id)
        chosen = plan.candidates[0]
        flight.decode, flight.prefill, flight.expected_cached = chosen.decode, chosen.prefill, chosen.decode_cached
        flight.alternative = next(iter(plan.prefill_alternatives), None)
        flight.bookings = book(self.members, request, chosen, flight.hashes, block_tokens)
        if flight.bookings[0] is not None:
            flight.dispatch = flight.bookings[0].number
        self.clock.after(self.setting.delay_s, self._decode_by_name[plan.decode].submit, flight, self._fetch)

    def _fetch(self, flight: Flight) -> None:
        assert flight.prefill is not None
        arrived = self._decode_by_name[flight.decode].arrived
        self.clock.after(self.setting.delay_s, self._prefill_by_name[flight.prefill].open, flight, arrived)

    def _first(self, flight: Flight) -> None:
        self.clock.after(self.setting.delay_s, self._prompt_done, flight)

    def _prompt_done(self, flight: Flight) -> None:
        self.members.release(flight.bookings[1])

    def _end(self, flight: Flight) -> None:
        machine = self.setting.machine
        self._spend(max(machine.request_cpu_ms - machine.overhead_ms, 0.0), _nothing)
        self.clock.after(self.setting.delay_s, self._forget, flight)

    def _forget(self, flight: Flight) -> None:
        unreported = self.members.release(flight.bookings[0])
        self.members.release(flight.bookings[1])
        if not unreported:
            self.members.ended(flight.decode, Load(sequences=1))
        self.admission.leave(f"{self.setting.seed}-{flight.number}")

    # After it -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless every request ended exactly once and nothing is left behind."""
        for flight in self.flights:
            assert flight.rejected or 0 < flight.arrived_at <= flight.first_at <= flight.ended_at, flight.number
        assert self.admission.inflight == 0 and self.members.bookings() == 0
        for worker in (*self.prefill, *self.decode):
            worker.cache.check_integrity()
            assert worker.engine.queued_tokens == worker.engine.running == worker.engine.waiting == 0
            assert worker.engine.context == worker.engine.prompt_tokens == 0
            assert len(worker.cache) <= (self.setting.pool_blocks or self.setting.cache_blocks)
        assert self.cores is None or (self.cores.free == self.setting.slots and not self.cores.busy)
        self.index.check_integrity()


def _nothing() -> None:
    """Nobody waits for it."""


def _window(load: Sequence[Arrival]) -> tuple[float, float]:
    reported = [arrival.at for arrival in load if arrival.reported]
    return (reported[0], reported[-1]) if reported else (0.0, 0.0)
