"""A minute of `benchmarks/soak.py`: mixed load and a fault every ten seconds leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import SPARED, Soak, running_cluster
from benchmarks.soak_watch import Sample, after

SECONDS = 60
FAULT_S = 10
SETTLED_S = 20
GROWN_MIB = 64
"""Caches still fill within a minute; a leak of a prompt's KV a request would be more."""
GROWN_DESCRIPTORS = 60
GROWN_THREADS = 16


def grown(life: list[Sample], figure: str) -> float:
    settled = after(life, SETTLED_S)
    return settled[-1].figures[figure] - settled[0].figures[figure]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_minute_of_mixed_load_and_faults(tmp_path: Path) -> None:
    with running_cluster(tmp_path, "round_robin", workers=2) as views:
        soak = Soak(views, "even", seed=1)
        await soak.run(SECONDS, FAULT_S, rate=2.0)
    report = soak.report
    assert not report.unexplained() and not report.held, report.text()
    assert report.begun == len(report.ends), report.text()
    assert len(report.faults) >= 3 and len(report.ends) > SECONDS, report.text()
    assert {end.kind for end in report.ends if end.outcome == "answered"} >= {"chat", "grammar", "several", "known"}
    lives = soak.watch.longest()
    for name in SPARED:
        assert grown(lives[name], "own") < GROWN_MIB, report.text()
        assert grown(lives[name], "descriptors") < GROWN_DESCRIPTORS, report.text()
        assert grown(lives[name], "threads") < GROWN_THREADS, report.text()
