"""What an operator's commands say of a cluster of real processes that is at work."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tandem.cli.app import run
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster

TOKEN = "secret-of-sixteen"
FRAMES_S = 60.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One router, one prefill and one decode worker that share a secret."""
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", CheckpointSpec(layers=2, seed=5))
    arguments = ["--kv-mib", "16MiB", "--drain-s", "1s"]
    with cluster(model, tmp_path_factory.mktemp("logs"), worker_args=arguments, token=TOKEN) as made:
        yield made


@contextmanager
def load(on: Cluster) -> Iterator[None]:
    """One request after the other, each with a prompt of its own."""
    stop, failures = threading.Event(), list[Exception]()

    def work() -> None:
        try:
            for seed in range(100_000):
                if stop.is_set():
                    return
                prompt = [(seed * 31 + at * 17) % 250 for at in range(200)]
                on.post("/v1/completions", {"model": "llama", "prompt": prompt, "max_tokens": 16, "ignore_eos": True})
        except Exception as error:  # noqa: BLE001 - the test shows it
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_TOKEN", TOKEN)


def told(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def lines(report: Any) -> dict[str, dict[str, dict[str, str]]]:
    return {group["name"]: {check["name"]: check for check in group["checks"]} for group in report["groups"]}


@pytest.mark.usefixtures("secret")
def test_the_doctor_finds_a_sound_cluster_and_moves_kv(running: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with load(running):
        report = told(capsys, 0, "doctor", "--cluster", "--router", f"127.0.0.1:{running.router.port}")
    found = lines(report)
    assert list(found) == ["routers", "workers", "agreement", "transfers"]
    wrong = [check for group in found.values() for check in group.values() if check["state"] != "ok"]
    assert wrong == []
    ports = {name: f"127.0.0.1:{process.port}" for name, process in running.workers.items()}
    assert {f"prefill {ports['prefill-0']}", f"decode {ports['decode-0']}"} <= set(found["workers"])
    (transfer,) = found["transfers"].values()
    assert transfer["name"] == f"{ports['prefill-0']} -> {ports['decode-0']}"
    assert "MiB/s (best of 5 writes of 8 MiB" in transfer["found"]


def test_workers_answer_nobody_without_the_secret(running: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(told(capsys, 1, "doctor", "--cluster", "--router", f"127.0.0.1:{running.router.port}"))
    states = {name: check for name, check in found["workers"].items() if name.startswith(("prefill", "decode"))}
    assert {check["state"] for check in states.values()} == {"error"}
    assert all("knows another one" in check["found"] and "TANDEM_TOKEN" in check["fix"] for check in states.values())


def frame_at_work(capsys: pytest.CaptureFixture[str], address: str) -> Any:
    """The first frame in which a whole request fell: on a busy machine one takes longer than some frames."""
    deadline = time.monotonic() + FRAMES_S
    while True:
        frame = told(capsys, 0, "top", "--router", address, "--every", "1s")
        moved = [pair["mib"] for pair in frame["pairs"]]
        rates = [each["tokens_per_s"] for each in (frame["router"], *frame["workers"])]
        if all((*rates, frame["router"]["ttft_p50_s"], any(moved))) or time.monotonic() > deadline:
            return frame


@pytest.mark.usefixtures("secret")
def test_top_shows_work(running: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{running.router.port}"
    with load(running):
        frame = frame_at_work(capsys, address)
        assert run(["top", "--once", "--router", address, "--every", "250ms"]) == 0
        picture = capsys.readouterr().out
    assert frame["router"]["tokens_per_s"] > 0
    assert frame["router"]["ttft_p50_s"] > 0
    workers = {each["role"]: each for each in frame["workers"]}
    assert {role: each["state"] for role, each in workers.items()} == {"prefill": "ready", "decode": "ready"}
    assert workers["prefill"]["tokens_per_s"] > 0
    assert workers["decode"]["cached_share"] > 0
    (pair,) = frame["pairs"]
    assert (pair["sender"], pair["receiver"]) == (workers["prefill"]["address"], workers["decode"]["address"])
    assert pair["mib"] > 0
    assert "2 workers" in picture
    assert workers["decode"]["address"] in picture
