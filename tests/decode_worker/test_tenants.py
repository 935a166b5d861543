"""What each tenant used of a worker: counted while it matters, forgotten afterwards."""

from __future__ import annotations

from decode_worker.tenants import KEPT_S, TenantLedger
from tandem.cluster import TenantUse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_and_tokens_are_counted_by_tenant_and_router() -> None:
    clock = Clock()
    ledger = TenantLedger(clock)
    ledger.admitted("a", "r1", 10)
    ledger.admitted("a", "r2", 5)
    ledger.admitted("a", "r1", 3)
    ledger.made("a", "r1", 4)
    ledger.ended("a", "r1")
    assert set(ledger.uses()) == {TenantUse("a", "r1", 2, 17, 1), TenantUse("a", "r2", 1, 5, 1)}
    ledger.admitted("", "r1", 10)
    ledger.made("", "r1", 10)
    ledger.ended("", "r1")
    assert len(ledger.uses()) == 2


def test_the_idle_are_forgotten_and_count_anew() -> None:
    clock = Clock()
    ledger = TenantLedger(clock)
    ledger.admitted("a", "r", 10)
    ledger.admitted("b", "r", 10)
    ledger.ended("a", "r")
    clock.now += KEPT_S + 1
    assert ledger.uses() == (TenantUse("b", "r", 1, 10, 1),)
    ledger.admitted("a", "r", 7)
    assert TenantUse("a", "r", 1, 7, 1) in ledger.uses()
