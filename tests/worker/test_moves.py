"""What was moved is counted by pair and transport."""

from __future__ import annotations

import pytest

from tandem.cluster import MoveStat
from tandem.worker.moves import MoveLedger, WriteRate


def test_moves_are_counted_by_pair_and_transport() -> None:
    ledger = MoveLedger("d")
    for sender, transport, size, seconds in [("p", "tcp", 100, 1.0), ("p", "tcp", 50, 0.5), ("q", "tcp", 7, 0.25)]:
        ledger.add(sender, transport, size, seconds)
    ledger.add("p", "nixl", 1, 0.125)
    ledger.add("p", "nixl", 0, 9.0)
    assert set(ledger.stats()) == {
        MoveStat("p", "d", "tcp", 150, 1.5, 2),
        MoveStat("q", "d", "tcp", 7, 0.25, 1),
        MoveStat("p", "d", "nixl", 1, 0.125, 1),
    }


def test_the_rate_follows_recent_writes() -> None:
    rate = WriteRate()
    assert rate.bytes_per_ms() == 0.0
    rate.add("d", "tcp", 1000, 0.01)
    assert rate.bytes_per_ms() == pytest.approx(100.0)
    for _ in range(120):
        rate.add("d", "tcp", 1000, 0.1)
    assert rate.bytes_per_ms() == pytest.approx(10.0, rel=0.03)
