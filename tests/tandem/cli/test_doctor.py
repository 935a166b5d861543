"""`tandem doctor` says what is there, and what is used because something is not."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import kvtransfer.backends
from kvtransfer.base import TransportError
from tandem.cli import doctor
from tandem.cli.app import run
from tandem.device import accelerators
from tandem.engine.kernels import choose


@pytest.fixture(autouse=True)
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable() -> None:
        raise TransportError("there is no agent")

    monkeypatch.setattr(kvtransfer.backends, "NixlBackend", unusable)


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, doctor.Finding]:
    assert run(["doctor", "--json"]) == 0
    return {each["about"]: doctor.Finding(**each) for each in json.loads(capsys.readouterr().out)}


def test_the_report_names_what_decides_speed(capsys: pytest.CaptureFixture[str]) -> None:
    report = found(capsys)
    assert report["packages"].found.startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert report["threads"].found == f"{torch.get_num_threads()} for a worker that sets none"
    assert report["KV transport"] == doctor.Finding(
        "KV transport", "tcp: nixl cannot be used here: there is no agent", False
    )
    assert report["accelerators"].found == (", ".join(accelerators()) or "none")
    native = report["compiler"].found != "none"
    assert report["kernels"].found.startswith("native: " if native else "torch: no C++ compiler")


def test_without_a_compiler_it_says_what_is_used_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "find_compiler", lambda: None)
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING):
        report = found(capsys)
    assert report["compiler"] == doctor.Finding("compiler", "none", False)
    assert report["kernels"] == doctor.Finding(
        "kernels", "torch: no C++ compiler is installed (g++, c++, clang++)", False
    )
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "decoding will be slow: plain PyTorch is used in place of the native CPU kernels: "
        "no C++ compiler is installed (g++, c++, clang++)"
    ]


def test_the_table_has_a_line_for_each_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor,
        "examine",
        lambda: [doctor.Finding("kernels", "native: AVX2"), doctor.Finding("compiler", "none", False)],
    )
    doctor.doctor(as_json=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["kernels", "native:", "AVX2"],
        ["compiler", "none"],
    ]
