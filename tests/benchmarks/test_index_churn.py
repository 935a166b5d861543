"""Workers that come, restart and go, in small; `benchmarks.index_churn` does it for a million requests."""

from __future__ import annotations

import pytest

from benchmarks import index_churn
from benchmarks.index_churn import Churn


def test_restarted_workers_are_never_hit_for_former_blocks_and_nothing_stays_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_churn, "RESTART", 1 / 40)
    churn = Churn(workers=6, capacity=300, max_blocks=1000, seed=3)
    for number in range(2500):
        churn.request()
        assert len(churn.index) <= 1000
        if number % 250 == 0:
            churn.index.check_integrity()
    churn.finish()
    assert churn.restarts > 30
    assert churn.hits > 1000
