"""Defects planted in the shipped code are found: the simulation's checks can fail."""

from __future__ import annotations

from typing import Any

import pytest

from decode_worker.service import DecodeService
from kvtransfer.inbound import PairClient
from kvtransfer.service import HandOverService
from router.cache.prefix_index import PrefixIndex
from router.open_request import OpenRequest
from router.workers.load import LoadLedger
from router.workers.snapshot import FleetSnapshot
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
CUT = plan(
    tuple(Ask(1.0 + 0.4 * n, LONG[n:], 4) for n in range(20)),
    Fault(1.0, "partition", "prefill-0", "decode-0", lasts_s=6.0),
    shape=Shape(prefill=2, policy="round_robin"),
)


@pytest.mark.parametrize("sound", [LEAVING, CALM, RESTARTED, STALE, POISON, DRAINING, CUT])
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


def test_tokens_counted_twice_after_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = OpenRequest.resume_points
    monkeypatch.setattr(OpenRequest, "resume_points", lambda self: [(c, max(n - 1, 0)) for c, n in shipped(self)])
    monkeypatch.setattr("router.open_request._without_first", lambda delta, repeated: delta)
    assert any("I2" in line for line in found(range(80), scenario))


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


def test_an_index_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_bound", lambda self: None)
    assert any("I6: the index has" in line for line in found(range(20), scenario))


def test_a_draining_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.policies.base.eligible", list)
    assert any("I7" in line and "draining" in line for line in found(range(4), lambda seed: DRAINING))


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
