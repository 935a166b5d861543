"""`tandem doctor` says what is there, what is wrong, and how to mend it."""

from __future__ import annotations

import json
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from kvtransfer.base import TransportError
from tandem.cli.app import run
from tandem.cli.doctor import engine, machine, models, packages, report, settings, transports
from tandem.cli.doctor.report import Check, Group, State
from tandem.engine.kernels import choose
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint


@pytest.fixture(autouse=True)
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable() -> None:
        raise TransportError("there is no agent")

    monkeypatch.setattr(transports, "NixlBackend", unusable)


def by_name(group: Group) -> dict[str, Check]:
    return {check.name: check for check in group.checks}


def test_the_report_is_json_with_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = run(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    states = {check["state"] for group in told["groups"] for check in group["checks"]}
    assert [group["name"] for group in told["groups"]] == ["machine", "packages", "kernels", "transports", "ports"]
    assert told["ok"] is ("error" not in states)
    assert status == int("error" in states)
    for group in told["groups"]:
        assert all(bool(check["fix"]) == (check["state"] != "ok") for check in group["checks"])


def test_an_error_is_exit_code_1_and_the_tree_shows_its_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [Group("kernels", [Check("a", "fine"), Check("b", "slow", State.WARNING, "do this")])]
    monkeypatch.setattr("tandem.cli.doctor.examine", lambda model: groups)
    assert run(["doctor"]) == 0
    groups.append(Group("ports", [Check("c", "[broken]", State.ERROR, "do that " * 30)]))
    capsys.readouterr()
    assert run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "this machine",
        "├─ kernels",
        "│  ok      a: fine",
        "│  warning b: slow",
        "│          fix: do this",
    ]
    assert lines[5:7] == ["└─ ports", "   error   c: [broken]"]
    assert lines[7] == "           fix: " + "do that " * 30
    assert lines[8] == "1 ok, 1 warning, 1 error"


def test_a_check_that_is_not_fine_has_a_fix() -> None:
    with pytest.raises(AssertionError, match="a fix"):
        Check("a", "b", State.ERROR)
    with pytest.raises(AssertionError, match="a fix"):
        Check("a", "b", State.OK, "c")


# Machine ------------------------------------------------------------------------------------------------------------


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
    monkeypatch.setattr("tandem.cli.doctor.machine.resource.getrlimit", lambda _: (soft, hard))


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, 1024, 4096)
    assert by_name(machine.check_machine())["open files"] == Check(
        "open files",
        "1024, can be raised to 4096",
        State.WARNING,
        "ulimit -n 8448 or LimitNOFILE=8448 where the router is started; or set --max-connections lower",
    )
    limits(monkeypatch, 1024, resource.RLIM_INFINITY)
    assert by_name(machine.check_machine())["open files"].state is State.OK


def test_locked_memory_counts_where_there_is_rdma(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits(monkeypatch, 8 << 20, 8 << 20)
    monkeypatch.setattr(machine, "RDMA", tmp_path / "none")
    assert by_name(machine.check_machine())["locked memory"].state is State.OK
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(machine, "RDMA", tmp_path)
    found = by_name(machine.check_machine())["locked memory"]
    assert (found.state, "mlx5_0" in found.found, "IPC_LOCK" in found.fix) == (State.WARNING, True, True)


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tandem.cli.doctor.machine.shutil.disk_usage", lambda _: SimpleNamespace(total=64 << 20, free=64 << 20)
    )
    found = by_name(machine.check_machine())["shared memory"]
    assert (found.state, "--shm-size" in found.fix) == (State.WARNING, True)


def test_a_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = by_name(machine.check_machine())["cache folder"]
    assert (found.state, "XDG_CACHE_HOME" in found.fix) == (State.ERROR, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert by_name(machine.check_machine())["cache folder"].state is not State.ERROR
    assert not [path for path in (tmp_path / "tandem").iterdir() if stat.S_ISREG(path.stat().st_mode)]


def test_a_clock_that_runs_free_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, state in ((5, State.WARNING), (0, State.OK)):
        library = SimpleNamespace(adjtimex=lambda _, answer=answer: answer)
        monkeypatch.setattr("tandem.cli.doctor.machine.ctypes.CDLL", lambda _, library=library: library)
        assert by_name(machine.check_machine())["clock"].state is state


# Packages -----------------------------------------------------------------------------------------------------------


def test_packages_are_held_against_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "": [Requirement("torch<1"), Requirement("numpy>=2")],
        "engine": [Requirement("no-such-package>=1")],
        "ray": [Requirement("no-such-package>=1")],
        "nixl": [Requirement("numpy>=99")],
    }
    monkeypatch.setattr(packages, "requirements", lambda: wanted)
    found = by_name(packages.check_packages())
    assert found["core"].state is State.ERROR
    assert found["core"].found.startswith("out of range: torch 2.")
    assert found["core"].fix == "pip install tandem-serve (wanted: torch<1)"
    assert (found["[engine]"].state, "no worker" in found["[engine]"].fix) == (State.WARNING, True)
    assert (found["[ray]"].state, found["[ray]"].found) == (State.OK, "not installed: no-such-package")
    assert found["[nixl]"].state is State.WARNING


def test_the_ranges_are_those_of_the_project() -> None:
    found = packages.requirements()
    assert {each.name for each in found[""]} >= {"grpcio", "pydantic", "typer"}
    assert {each.name for each in found["engine"]} >= {"torch"}


# Kernels and transports ---------------------------------------------------------------------------------------------


def test_the_report_names_what_decides_speed() -> None:
    found = by_name(engine.check_kernels())
    assert found["threads"].found == f"{torch.get_num_threads()} for a worker that sets none"
    native = found["compiler"].state is State.OK
    assert found["CPU kernels"].found.startswith("native: " if native else "torch: no C++ compiler")


def test_without_a_compiler_it_says_what_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_compiler", lambda: None)
    monkeypatch.setattr(engine, "find_compiler", lambda: None)
    found = by_name(engine.check_kernels())
    assert (found["compiler"].state, "apt install g++" in found["compiler"].fix) == (State.WARNING, True)
    assert found["CPU kernels"].found == "torch: no C++ compiler is installed (g++, c++, clang++)"
    assert found["CPU kernels"].state is State.WARNING


def test_a_transport_is_used_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(transports.check_transports())
    assert found["nixl"].state is State.WARNING
    assert found["nixl"].found == "moves no page: there is no agent"
    assert found["tcp"].state is State.OK

    def lost(*_: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(transports, "send_page", lost)
    assert by_name(transports.check_transports())["tcp"].state is State.ERROR


# Model and ports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "line", "says"),
    [
        (lambda folder: None, "", ""),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "checkpoint", "is cut short"),
        (lambda folder: (folder / "config.json").unlink(), "checkpoint", "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(missing_ok=True), "tokenizer", "none"),
    ],
)
def test_a_model_is_looked_at(spoil: Callable[[Path], Any], line: str, says: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", CheckpointSpec(layers=1, vocab=300, max_positions=512))
    (folder / "tokenizer.json").touch()
    spoil(folder)
    found = by_name(models.check_model(str(folder)))
    assert [name for name, check in found.items() if check.state is State.ERROR] == ([line] if line else [])
    assert not line or says in found[line].found


def test_no_model_is_an_error() -> None:
    found = by_name(models.check_model("/no/such"))
    assert found["found"].found == "model is /no/such; there is no such folder"
    assert found["found"].state is State.ERROR


def test_a_taken_port_is_one_line_with_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TANDEM_METRICS_PORT", str(port))
        found = by_name(settings.check_ports())["worker's metrics port"]
    assert found.found == f"--metrics-port: 127.0.0.1:{port} cannot be listened on: address already in use"
    assert found.fix == "stop what listens there, or give another with --metrics-port"


def test_wrong_settings_are_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOST", "0.0.0.0")
    found = by_name(settings.check_ports())
    assert found["settings of `tandem router`"].state is State.ERROR
    assert "--api-keys" in found["settings of `tandem router`"].found
    monkeypatch.setenv("TANDEM_TOKEN", "secret-of-sixteen")
    monkeypatch.setenv("TANDEM_METRICS_TOKEN", "secret-of-sixteen")
    found = by_name(settings.check_ports())
    assert found["TANDEM_METRICS_TOKEN"] == Check("TANDEM_METRICS_TOKEN", "set; others reach 0.0.0.0")


def test_the_tree_has_no_markup_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("t", [Group("g", [Check("[red]a", "[/]")])], Console())
    assert "[red]a: [/]" in capsys.readouterr().out
