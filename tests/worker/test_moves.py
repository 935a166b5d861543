"""What was moved is counted by pair and transport."""

from __future__ import annotations

import pytest

from tandem.cluster import EARLIER, MoveStat
from tandem.worker.moves import MAX_PAIRS, MoveLedger, WriteRate


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


def test_senders_of_long_ago_are_counted_together() -> None:
    ledger = MoveLedger("d")
    ledger.add("steady", "tcp", 10, 0.5)
    last = 0
    for index in range(MAX_PAIRS + 100):
        ledger.add(f"p{index}", ("tcp", "nixl")[index % 2], 10, 0.5)
        ledger.failed(f"p{index}", ("tcp", "nixl")[index % 2])
        ledger.add("steady", "tcp", 10, 0.5)
        total = sum(stat.bytes for stat in ledger.stats())
        assert total == last + (20 if index else 30)
        last = total
    stats = ledger.stats()
    assert len(stats) == MAX_PAIRS + 2
    assert MoveStat("steady", "d", "tcp", 10 * (MAX_PAIRS + 101), 0.5 * (MAX_PAIRS + 101), MAX_PAIRS + 101) in stats
    folded = 101  # the steady sender has a place, too
    assert {stat for stat in stats if stat.sender == EARLIER} == {
        MoveStat(EARLIER, "d", "tcp", 10 * 51, 0.5 * 51, 51, 51),
        MoveStat(EARLIER, "d", "nixl", 10 * 50, 0.5 * 50, 50, 50),
    }
    assert {stat.sender for stat in stats} == {EARLIER, "steady"} | {
        f"p{index}" for index in range(folded, MAX_PAIRS + 100)
    }


def test_the_rate_follows_recent_writes() -> None:
    rate = WriteRate()
    assert rate.bytes_per_ms() == 0.0
    rate.add("d", "tcp", 1000, 0.01)
    assert rate.bytes_per_ms() == pytest.approx(100.0)
    for _ in range(120):
        rate.add("d", "tcp", 1000, 0.1)
    assert rate.bytes_per_ms() == pytest.approx(10.0, rel=0.03)
