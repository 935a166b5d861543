"""Defects planted in the shipped code are found: the simulation's checks can fail."""

from __future__ import annotations

from typing import Any

import pytest

from kvtransfer.inbound import PairClient
from kvtransfer.service import HandOverService
from router.open_request import OpenRequest
from router.workers.load import LoadLedger
from tandem.wire.v1 import handover_pb2
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


@pytest.mark.parametrize("sound", [LEAVING, CALM, RESTARTED])
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
