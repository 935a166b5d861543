"""Rounds become medians, two fits one machine, and all fits one measure of how processes hinder one another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.load import Measured
from benchmarks.report import summarize
from benchmarks.simulator_check import Case, Check, Played, Round, Run, machines, mean, over_rounds
from benchmarks.systems import Setting
from router.simulation.setting import Machine
from tandem.traces import TraceEntry

NOTHING = summarize(Measured((), 1.0, 0.0))


def test_medians_over_rounds_are_of_ratios_within_a_round() -> None:
    pairs = ((10.0, 20.0), (40.0, 40.0), (30.0, 10.0))
    rounds: list[Round] = [{"cost": {"TTFT": pair}} for pair in pairs]
    assert over_rounds(rounds) == {"cost": {"TTFT": (30.0, 20.0, 1.0)}}
    assert over_rounds([{"cost": {"TTFT": (1.0, 0.0)}}]) == {"cost": {"TTFT": (1.0, 0.0, 0.0)}}


def test_a_run_between_two_fits_is_on_a_machine_between_them() -> None:
    slow, fast = Machine(2.0, 0.2, link_bytes_per_ms=1e6), Machine(1.0, 0.1, link_bytes_per_ms=3e6)
    found = mean(asdict(slow), asdict(fast))
    assert (found.base_ms, found.per_token_ms) == pytest.approx((1.5, 0.15))
    assert found.link_bytes_per_ms == pytest.approx(1.5e6)  # twice as much is moved in the time of both
    assert found.kv_tokens == slow.kv_tokens


def test_how_much_processes_hinder_one_another_is_the_median_of_all_fits() -> None:
    fits = [asdict(Machine(base, contention=contention)) for base, contention in ((1.0, 2.0), (3.0, 9.0), (5.0, 4.0))]
    runs = [
        Run("cost", (fits[0], fits[1]), Played(NOTHING, 1.0)),
        Run("cost", (fits[1], fits[2]), Played(NOTHING, 1.0)),
    ]
    assert [(each.base_ms, each.contention) for each in machines(runs)] == [(2.0, 4.0), (4.0, 4.0)]


def test_a_round_is_every_policys_prediction_beside_what_was_measured(tmp_path: Path) -> None:
    case = Case(tmp_path, 3, 0.125, 1, 1, Setting(tmp_path, kv_mib=8))
    entries = [TraceEntry(1000.0 * n, 1024, 64, (2 * n, 2 * n + 1)) for n in range(3)]
    check = Check(case, entries, seed=0)
    fit = asdict(Machine(1.0, 0.1, 0.0, 512, 64, kv_tokens=4096))
    check.runs = [Run(policy, (fit, fit), Played(NOTHING, 2.0)) for policy in ("cost", "round_robin") * 2]
    first, second = check.rounds(2)
    assert first == second and list(first) == ["cost", "round_robin"]
    # 128 tokens of a prompt and 8 of an answer, three times, in steps of two workers.
    predicted, measured = first["round_robin"]["steps, s"]
    assert predicted == pytest.approx(3 * (127 * 0.1 + 1.0 + 8 * 1.1) / 1e3, rel=0.1)
    assert measured == 2.0
