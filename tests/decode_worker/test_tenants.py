"""What each tenant used of a worker: counted while it matters, forgotten afterwards."""

from __future__ import annotations

from decode_worker.tenants import KEPT_S, TenantLedger
from tandem.cluster import TenantUse
from tandem.types import GenerateRequest, SamplingParams


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(tenant: str, tokens: int = 1, follows: bool = False) -> GenerateRequest:
    return GenerateRequest("r", "m", (1,) * tokens, SamplingParams(), tenant=tenant, follows=follows)


def test_requests_and_tokens_are_counted_by_tenant_and_router() -> None:
    clock = Clock()
    ledger = TenantLedger(clock)
    ledger.admitted(asked("a", 10), "r1")
    ledger.admitted(asked("a", 5), "r2")
    ledger.admitted(asked("a", 3), "r1")
    ledger.made("a", "r1", 4)
    ledger.ended(asked("a"), "r1")
    assert set(ledger.uses()) == {TenantUse("a", "r1", 2, 17, 1), TenantUse("a", "r2", 1, 5, 1)}
    ledger.admitted(asked("", 10), "r1")
    ledger.made("", "r1", 10)
    ledger.ended(asked(""), "r1")
    assert len(ledger.uses()) == 2


def test_the_idle_are_forgotten_and_count_anew() -> None:
    clock = Clock()
    ledger = TenantLedger(clock)
    ledger.admitted(asked("a", 10), "r")
    ledger.admitted(asked("b", 10), "r")
    ledger.ended(asked("a"), "r")
    clock.now += KEPT_S + 1
    assert ledger.uses() == (TenantUse("b", "r", 1, 10, 1),)
    ledger.admitted(asked("a", 7), "r")
    assert TenantUse("a", "r", 1, 7, 1) in ledger.uses()


def test_prompts_that_come_together_are_one_request() -> None:
    """As at the router that they come through: else other routers would refuse the tenant too early."""
    clock = Clock()
    ledger = TenantLedger(clock)
    for number in range(3):
        ledger.admitted(asked("a", 10, follows=number > 0), "r")
    assert ledger.uses() == (TenantUse("a", "r", 1, 30, 1),)
    ledger.ended(asked("a"), "r")
    clock.now += KEPT_S + 1
    ledger.made("a", "r", 5)
    ledger.admitted(asked("b"), "r")
    assert TenantUse("a", "r", 1, 35, 0) in ledger.uses(), "the others have not ended"
    for _ in range(2):
        ledger.ended(asked("a", follows=True), "r")
    clock.now += KEPT_S + 1
    assert [use.tenant for use in ledger.uses()] == ["b"]


def test_what_goes_on_here_was_counted_where_it_began() -> None:
    ledger = TenantLedger(Clock())
    moved = asked("a", 10).again(((5, 6),))
    ledger.admitted(moved, "r")
    ledger.made("a", "r", 3)
    assert ledger.uses() == (TenantUse("a", "r", 0, 3, 1),)
    ledger.ended(moved, "r")
    assert ledger.uses() == (TenantUse("a", "r", 0, 3, 0),)
    refused = asked("a", 10).again()
    ledger.admitted(refused, "r")
    assert ledger.uses() == (TenantUse("a", "r", 1, 13, 1),), "nobody had taken it before"
