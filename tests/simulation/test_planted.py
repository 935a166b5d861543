"""Defects planted in the shipped code are found: the simulation's checks can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from decode_worker.requests import Choice
from decode_worker.service import DecodeService
from kvtransfer.inbound import PairClient
from kvtransfer.service import HandOverService
from router.admission.quota import Quotas
from router.cache.prefix_index import PrefixIndex
from router.cache.tails import TailMemory
from router.dispatch import Dispatcher
from router.open_request import OpenRequest
from router.workers.load import Booking, LoadLedger
from router.workers.pairs import PairHealth
from router.workers.snapshot import FleetSnapshot, Load
from tandem.engine.memory import KvMemory
from tandem.types import GenerateRequest
from tandem.wire.v1 import decode_pb2, handover_pb2
from tandem.worker.kv_source import EngineKvSource
from tests.simulation.cluster import Shape
from tests.simulation.memory import Mischief
from tests.simulation.run import run
from tests.simulation.scenario import Ask, Fault, Scenario, scenario

LONG = tuple(token % 50 for token in range(3, 243))


def plan(asks: tuple[Ask, ...], *faults: Fault, shape: Shape | None = None) -> Scenario:
    return Scenario(0, shape or Shape(write_s=(0.01, 0.3), policy="round_robin"), asks, faults, Mischief())


def found(seeds: range, scenario_of: Any) -> list[str]:
    """What the first seed that finds anything finds."""
    for seed in seeds:
        if wrong := run(seed, scenario_of(seed)).wrong:
            return wrong
    return []


LEAVING = plan(tuple(Ask(1.0 + 0.05 * n, LONG[n:], 4, leaves_after_s=0.2) for n in range(8)))
CALM = plan(tuple(Ask(0.1 * n, LONG[n:], 60) for n in range(3)), shape=Shape(policy="round_robin", step_s=(0.1, 0.2)))
RESTARTED = plan(
    tuple(Ask(0.5 + 0.05 * n, LONG[n:], 4) for n in range(10)),
    Fault(0.5, "partition", "router", "prefill-0", lasts_s=0.5),
    Fault(0.6, "kill", "prefill-0", lasts_s=0.05),
)
"""Another prefill worker is there than the router believes."""


STALE = plan(
    tuple(Ask(1.04 + 0.002 * n, LONG[n:], 2) for n in range(30)),
    Fault(0.9, "partition", "router", "decode-0", lasts_s=0.15),
    Fault(0.95, "kill", "decode-0", lasts_s=0.01),
    shape=Shape(decode=2, policy="round_robin", notice_s=0.03),
)
"""A decode worker is replaced while the router does not see it, and asked before the router hears of that."""
POISON = plan(
    (Ask(1.0, LONG[:40], 60),),
    *(Fault(1.3 + 0.7 * n, "kill", f"decode-{n % 3}", lasts_s=0.3) for n in range(9)),
    shape=Shape(decode=3, policy="round_robin", step_s=(0.05, 0.1)),
)
"""All decode workers end, one after the other, again and again."""
DRAINING = plan(
    tuple(Ask(1.0 + 0.05 * n, LONG[n:], 30) for n in range(20)),
    Fault(1.1, "terminate", "decode-0", lasts_s=5.0),
    shape=Shape(decode=2, policy="round_robin", step_s=(0.02, 0.2)),
)
DRAINING_PREFILL = plan(
    tuple(Ask(1.0 + 0.05 * n, LONG[n:], 4) for n in range(20)),
    Fault(1.1, "terminate", "prefill-0", lasts_s=5.0),
    shape=Shape(prefill=2, policy="round_robin", step_s=(0.02, 0.2)),
)
LOST = plan(
    tuple(Ask(0.5 + 0.1 * n, LONG[n:], 4) for n in range(6)),
    Fault(3.0, "kill", "decode-0", lasts_s=0.1),
    shape=Shape(decode=2, policy="round_robin"),
)
"""A decode worker ends that has done something."""
MOVED = plan(
    tuple(Ask(1.0 + 0.05 * n, LONG[n:], 30, min_tokens=30, logprobs=True) for n in range(4)),
    Fault(2.0, "kill", "decode-0", lasts_s=0.1),
    shape=Shape(decode=2, policy="round_robin", step_s=(0.05, 0.1)),
)
"""A decode worker ends that is doing something."""
CROWDED = plan(
    tuple(Ask(1.0 + 0.05 * n, LONG[n:], 8) for n in range(8)),
    shape=Shape(policy="round_robin", step_s=(0.02, 0.05), max_inflight=3, worker_backlog=1),
)
"""Requests wait at the router."""
CUT = plan(
    tuple(Ask(1.0 + 0.4 * n, LONG[n:], 4) for n in range(20)),
    Fault(1.0, "partition", "prefill-0", "decode-0", lasts_s=6.0),
    shape=Shape(prefill=2, policy="round_robin"),
)


SOUND = [LEAVING, CALM, RESTARTED, STALE, POISON, DRAINING, DRAINING_PREFILL, LOST, MOVED, CROWDED, CUT]


@pytest.mark.parametrize("sound", SOUND)
def test_without_a_defect_nothing_is_found(sound: Scenario) -> None:
    assert found(range(4), lambda seed: sound) == []


def test_a_slab_used_again_before_quiesced(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = PairClient._end

    def end(self: PairClient, fetch: Any) -> None:
        shipped(self, fetch)
        self._drop(fetch)

    monkeypatch.setattr(PairClient, "_end", end)
    assert any("I4" in line for line in found(range(20), lambda seed: LEAVING))


def test_a_stale_incarnation_accepted_by_a_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = HandOverService._hello

    async def hello(self: HandOverService, messages: Any) -> handover_pb2.Hello:
        async def fooled() -> Any:
            async for message in messages:
                changed = handover_pb2.ToSender()
                changed.CopyFrom(message)
                changed.hello.sender = self._me.incarnation
                yield changed

        return await shipped(self, fooled())

    monkeypatch.setattr(HandOverService, "_hello", hello)
    assert any("fence" in line for line in found(range(40), lambda seed: RESTARTED))


def test_a_lost_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = PairClient._send

    def send(self: PairClient, **body: Any) -> None:
        grants = body.get("grants")
        if grants is not None and any(grant.sequence == 3 for grant in grants.grants):
            return
        shipped(self, **body)

    monkeypatch.setattr(PairClient, "_send", send)
    assert any("counted" in line for line in found(range(4), lambda seed: CALM))


def test_load_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadLedger, "reported", lambda self, last_dispatch: None)
    assert any("I5" in line for line in found(range(4), lambda seed: CALM))


def test_load_whose_tokens_are_never_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: LoadLedger, booking: Booking) -> bool:
        if self._open.pop(booking.number, None) is None:
            return False
        self._booked += Load(-booking.load.sequences)
        self.changes += 1
        self._on_close(booking)
        return True

    monkeypatch.setattr(LoadLedger, "release", release)
    wrong = found(range(4), scenario)
    assert any("I5: the load of" in line for line in wrong)
    assert any("at rest: I5" in line and "tokens are queued" in line for line in wrong)
    assert any("at rest: I5" in line and "tokens are free" in line for line in wrong)


def test_load_that_is_taken_away_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = LoadLedger.reported

    def reported(self: LoadLedger, last_dispatch: int) -> None:
        ended = self._ended
        shipped(self, last_dispatch)
        self._ended = ended

    monkeypatch.setattr(LoadLedger, "reported", reported)
    assert any("at rest: I5" in line and "pending" in line for line in found(range(4), lambda seed: CALM))


def test_pages_reported_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = vars(KvMemory)["free_pages"].fget
    pages = property(lambda self: self.total_pages - 4 * (self.total_pages - shipped(self)))
    monkeypatch.setattr(KvMemory, "free_pages", pages)
    roomy = replace(CALM, shape=replace(CALM.shape, pages=300))
    assert any("I5" in line and "is counted on" in line for line in found(range(4), lambda seed: roomy))


def test_log_probabilities_repeated_after_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Choice.delta
    monkeypatch.setattr(
        Choice, "delta", lambda self: replace(shipped(self), logprobs=tuple(self.logprobs[self.sent :]))
    )
    assert any("I2" in line and "log-probabilities" in line for line in found(range(4), lambda seed: MOVED))


def test_least_tokens_counted_anew_after_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = GenerateRequest.again

    def again(self: GenerateRequest, *made: Any) -> GenerateRequest:
        return replace(shipped(self, *made), sampling=replace(self.sampling, min_tokens=0))

    monkeypatch.setattr(GenerateRequest, "again", again)
    assert any("I2" in line for line in found(range(40), lambda seed: MOVED))


def test_tokens_counted_twice_after_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = OpenRequest.resume_points
    monkeypatch.setattr(OpenRequest, "resume_points", lambda self: [(c, max(n - 1, 0)) for c, n in shipped(self)])
    monkeypatch.setattr("router.open_request._without_first", lambda delta, repeated: delta)
    assert any("I2" in line for line in found(range(80), scenario))


def test_a_place_that_nobody_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatcher, "worker_reported", lambda self, status: self.pairs.observe(status))
    assert any("somebody waits" in line for line in found(range(4), lambda seed: CROWDED))


async def _kept(self: Any, name: str) -> None:
    """Instead of closing a ticket."""


def test_pages_kept_for_a_ticket_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineKvSource, "close", _kept)
    assert any("at rest: prefill-0" in line for line in found(range(4), lambda seed: LEAVING))


def test_a_slab_range_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairClient, "_drop", lambda self, fetch: self._fetches.pop(fetch.state.ticket.ticket_id, None))
    assert any("at rest: decode-0" in line for line in found(range(4), lambda seed: LEAVING))


def test_a_dead_worker_left_in_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "drop", lambda self, incarnation: self.predictions.drop(incarnation))
    assert any("I6: the index knows" in line for line in found(range(4), lambda seed: RESTARTED))


@pytest.mark.parametrize(
    ("store", "method", "name"),
    [(TailMemory, "drop", "memory of tails"), (PairHealth, "forget", "health of pairs"), (Quotas, "forget", "quotas")],
)
def test_a_dead_worker_left_elsewhere(monkeypatch: pytest.MonkeyPatch, store: type, method: str, name: str) -> None:
    monkeypatch.setattr(store, method, lambda self, incarnation: None)
    assert any(f"I6: the {name} knows" in line for line in found(range(4), lambda seed: LOST))


def test_a_memory_of_tails_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TailMemory, "_forget", lambda self, key: self._tails.pop(key, None))
    assert any("the memory of tails contradicts itself" in line for line in found(range(4), lambda seed: LOST))


def test_an_index_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_bound", lambda self: None)
    assert any("I6: the index has" in line for line in found(range(20), scenario))


def test_a_draining_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.policies.base.eligible", list)
    assert any("I7" in line and "draining decode" in line for line in found(range(4), lambda seed: DRAINING))


def test_a_draining_prefill_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.policies.round_robin.eligible", list)
    assert any("I7" in line and "draining prefill" in line for line in found(range(4), lambda seed: DRAINING_PREFILL))


def test_a_broken_pair_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.placer.avoiding", lambda decided, broken: decided)
    assert any("I7" in line and "pair" in line for line in found(range(4), lambda seed: CUT))


def test_crashes_that_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.moves.MAX_CRASHES", 99)
    assert any("I8" in line and "lost over it" in line for line in found(range(4), lambda seed: POISON))


def test_a_worker_that_refused_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetSnapshot, "without", lambda self, names: self)
    assert any("I8" in line and "twice" in line for line in found(range(8), lambda seed: STALE))


def test_a_submission_meant_for_an_incarnation_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = DecodeService.Submit

    async def submit(self: DecodeService, request: decode_pb2.SubmitRequest, context: Any) -> decode_pb2.SubmitReply:
        fooled = decode_pb2.SubmitRequest()
        fooled.CopyFrom(request)
        fooled.incarnation = self._worker.info.incarnation
        return await shipped(self, fooled, context)

    monkeypatch.setattr(DecodeService, "Submit", submit)
    assert any("fence" in line for line in found(range(20), lambda seed: STALE))
