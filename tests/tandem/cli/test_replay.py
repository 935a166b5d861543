"""`tandem replay` from the command line to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli.app import EXIT_SETTINGS, run
from tandem.cli.replay_cells import make_policy, read_machine
from tandem.errors import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 300 * n, "input_length": 1100 + n, "output_length": 5, "hash_ids": [0, n % 7, 100 + n]}
        for n in range(1, 41)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_policies_are_compared_cell_by_cell(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["replay", str(trace), "--policy", "cost", "--policy", "benchmarks.baselines:sglang"]
    arguments += ["--prefill", "2", "--load", "0.5", "--load", "0.9", "--skip", "10", "--json", str(out)]
    assert run(arguments) == 0
    cells = json.loads(out.read_text())
    assert [(cell["load"], cell["setting"]["prefill"], cell["setting"]["decode"]) for cell in cells] == [
        (0.5, 2, 1),
        (0.9, 2, 1),
    ]
    for cell in cells:
        assert [each["policy"] for each in cell["results"]] == ["cost", "benchmarks.baselines:sglang"]
        assert all(each["requests"] == 30 and each["rejected_share"] == 0 for each in cell["results"])
        assert 0 < cell["ideal_share"] < 1
    shown = capsys.readouterr().out
    assert "load 90%" in shown and "sglang" in shown and "hit share" in shown


def test_wrong_settings_are_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--policy", "best"], "--policy: best: no such policy; give one of cost, longest_prefix"),
        (["--policy", "json:loads"], "--policy: json:loads:"),
        (["--skip", "40"], "40 requests are skipped of 40; at least one must be left"),
        (["--load", "-1"], "at least 0 is needed"),
    ):
        assert run(["replay", str(trace), *arguments]) == EXIT_SETTINGS
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


def test_only_policies_are_taken_by_path() -> None:
    assert make_policy("router.policies.least_loaded:LeastLoadedPolicy").name == "least_loaded"
    with pytest.raises(ConfigError, match=r"it is no router\.policies\.Policy"):
        make_policy("pathlib:Path")


def test_earlier_results_are_merged_and_not_run_again(trace: Path, tmp_path: Path) -> None:
    one, other, both = (tmp_path / name for name in ("one.json", "other.json", "both.json"))
    cells = ["replay", str(trace), "--prefill", "2", "--load", "0.5", "--load", "0.9"]
    assert run([*cells, "--policy", "cost", "--json", str(one)]) == 0
    assert run([*cells, "--policy", "round_robin", "--json", str(other)]) == 0
    # Changed by hand, so that it shows where a result comes from.
    changed = json.loads(one.read_text())
    changed[1]["results"][0]["hit_share"] = 0.123
    one.write_text(json.dumps(changed))
    policies = ["--policy", "cost", "--policy", "round_robin", "--policy", "least_loaded"]
    assert run([*cells, *policies, "--merge", str(one), "--merge", str(other), "--json", str(both)]) == 0
    merged = json.loads(both.read_text())
    assert merged[1]["results"][0]["hit_share"] == 0.123
    assert merged[0]["results"][:2] == [json.loads(path.read_text())[0]["results"][0] for path in (one, other)]
    assert merged[0]["results"][2]["policy"] == "least_loaded"
    # Another seed is another cell.
    assert run([*cells, "--policy", "cost", "--seed", "1", "--merge", str(one), "--json", str(both)]) == 0
    assert json.loads(both.read_text())[1]["results"][0]["hit_share"] != 0.123


def test_a_machine_is_read_from_a_file_and_from_numbers(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text('{"base_ms": 2, "kv_bytes": 2048.0}')
    machine = read_machine([str(path), "per_token_ms=0.5", "base_ms=3"])
    assert (machine.base_ms, machine.kv_bytes, machine.per_token_ms) == (3.0, 2048, 0.5)
    for wrong, text in (
        ("speed=1", "speed is none of base_ms"),
        ("base_ms=-1", "base_ms is -1; a number of at least 0 is needed"),
        (str(tmp_path / "none.json"), "No such file"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_machine([wrong])
