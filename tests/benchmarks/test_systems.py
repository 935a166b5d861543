from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.handover_ends import Case, layout_of, make_engine
from benchmarks.systems import Peers, Server, Setting, StartError, server
from tandem.ports import free_ports


def test_systems_by_name(tmp_path: Path) -> None:
    setting = Setting(Path("/models/a"), dtype="float32")
    made = server("tandem-2p3d", setting, Peers(), tmp_path)
    assert "--prefill 2 --decode 3 --dtype float32" in " ".join(made.command)
    small = Setting(Path("/models/a"), kv_mib=4)
    told = " ".join(server("tandem-4p2d-round_robin", small, Peers(), tmp_path).command)
    assert "tandem.cli up" in told and "--policy round_robin" in told and "--kv-mib 4" in told
    theirs = " ".join(server("tandem-4p2d-sglang", small, Peers(), tmp_path).command)
    assert "benchmarks.up sglang /models/a" in theirs and "--policy" not in theirs
    with pytest.raises(ValueError, match="vllm needs --vllm"):
        server("vllm", setting, Peers(), tmp_path)
    with pytest.raises(ValueError, match="vllm-pd needs --peers"):
        server("vllm-pd", setting, Peers(), tmp_path)
    with pytest.raises(ValueError, match="system is other; it must be one of tandem-1p1d"):
        server("other", setting, Peers(), tmp_path)
    installed = tmp_path / "peer"
    (installed / ".venv/bin").mkdir(parents=True)
    (installed / ".venv/bin/vllm").touch()
    kept = server("vllm", setting, Peers(vllm=installed), tmp_path)
    assert kept.keep and str(installed / ".venv/bin/vllm") == kept.command[0]


@pytest.mark.parametrize("keep", [True, False])
def test_a_server_runs_only_while_it_is_measured(keep: bool, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    made = Server("web", command, f"http://127.0.0.1:{port}", tmp_path / "log", keep=keep, ready="/")
    try:
        with made.running() as url:
            assert httpx.get(url).status_code == 200
            first = made.process
        assert (made.process is first) is keep
        if keep:
            with pytest.raises(httpx.TimeoutException):
                httpx.get(url, timeout=0.1)
        with made.running() as url:
            assert httpx.get(url).status_code == 200
    finally:
        made.end()
    assert made.process is None


def test_a_server_that_ends_says_where_its_output_is(tmp_path: Path) -> None:
    made = Server("web", [sys.executable, "-c", "1 / 0"], "http://127.0.0.1:1", tmp_path / "log")
    with pytest.raises(StartError, match=r"web did not start; its output is in .*log"), made.running():
        pass
    assert "ZeroDivisionError" in made.log.read_text()


def test_the_hand_overs_ends_agree_on_a_layout() -> None:
    assert layout_of("qwen2-370m").token_bytes == 12288
    assert layout_of("llama-8b").token_bytes == 131072
    with pytest.raises(ValueError, match="layout is x; it must be one of"):
        layout_of("x")
    engine, pool = make_engine(Case("qwen2-370m", 32, 16, 1.0, 1.0, "tcp"), cached=True)
    assert engine.capacity_tokens >= 64
    assert pool.plane("k", 0).abs().sum() > 0
