"""`tandem up` with real processes: what it shows, what it starts again, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.compute_slots import ComputeSlots
from tandem.config import child_environment
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.trust import Trust
from tandem.wire.probe import describe

START_S = 90.0
END_S = 15.0
SETTINGS = ("--port", "0", "--kv-mib", "4", "--log-level", "warning")
COMMIT = "a" * 40
TOKEN = "token-of-this-test"


@dataclass
class Up:
    """A running `tandem up`, and what it has said."""

    process: subprocess.Popen[bytes]
    log: Path
    seen: set[int] = field(default_factory=set)
    """Process ids of children that were there."""

    @property
    def said(self) -> str:
        return self.log.read_text()

    def children(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.seen.update(child.pid for child in found)
        return found

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.said:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        self.children()

    def end(self, number: int) -> int:
        """Sends a signal; returns the exit code after every process has ended."""
        self.children()
        self.process.send_signal(number)
        status = self.process.wait(END_S)
        deadline = time.monotonic() + END_S
        while left := [pid for pid in self.seen if runs(pid)]:
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.02)
        return status

    def fact(self, label: str) -> str:
        found = re.search(rf"^  {label} +(.*)$", self.said, flags=re.M)
        assert found, f"no {label}:\n{self.said}"
        return found[1]

    @property
    def url(self) -> str:
        return self.fact("listening on").split()[0]

    def ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/ready"):
            return True
        return False

    def ask(self, max_tokens: int = 4) -> dict[str, Any]:
        url = self.url + "/v1/completions"
        body = json.dumps({"prompt": list(range(100)), "max_tokens": max_tokens, "ignore_eos": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})) as answer:
            return dict(json.load(answer))


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def up(folder: Path, *arguments: str, **environment: str) -> Iterator[Up]:
    log = folder / "up.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli", "up", *arguments, *SETTINGS],
            stdout=file,
            stderr=file,
            env=child_environment(environment),
        )
    running = Up(process, log)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=2, vocab=300, max_positions=512)
    return make_checkpoint(tmp_path_factory.mktemp("up") / "tiny", spec)


async def test_a_cluster_stands_mends_itself_and_stops(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "up.yaml"
    settings.write_text("prefill: 1\ndecode: 1\npage_size: 32\n")
    with up(tmp_path, str(model), TANDEM_CONFIG=str(settings), TANDEM_TOKEN=TOKEN) as cluster:
        cluster.wait_for("Ctrl-C stops everything.")
        assert cluster.fact("topology") == "1 router, 1 prefill, 1 decode (disaggregated)"
        assert cluster.fact("model") == "tiny, context 512 tokens"
        assert cluster.fact("folder") == str(model)
        assert cluster.fact("KV") == "float32, pages of 32 tokens"
        assert cluster.fact("KV transport") in ("nixl", "tcp")
        pids = {name: int(cluster.fact(f"{name} .* pid").split()[0]) for name in ("router", "prefill-0", "decode-0")}
        assert set(pids.values()) == {child.pid for child in cluster.children()}
        assert paste(cluster).splitlines()[-2:] == ["data: [DONE]", ""]

        address = cluster.fact("decode-0").split()[0]
        before = await describe(address, Trust(TOKEN))
        assert before is not None
        psutil.Process(pids["decode-0"]).kill()
        cluster.wait_for("decode-0 was ended by SIGKILL; starting it again")
        while (after := await describe(address, Trust(TOKEN))) is None or after.incarnation == before.incarnation:
            await asyncio.sleep(0.05)
        await served_again(cluster)
        await drained(cluster, cluster.fact("prefill-0").split()[0])
        assert cluster.end(signal.SIGINT) == 0
        assert "Traceback" not in cluster.said


async def drained(cluster: Up, address: str) -> None:
    """Ends the only prefill worker by its incarnation: it is let go, and the decode worker prefills itself."""
    worker = await describe(address, Trust(TOKEN))
    assert worker is not None
    command = [sys.executable, "-m", "tandem.cli", "drain", worker.incarnation[:10], "--router", cluster.url]
    environment = child_environment({"TANDEM_TOKEN": TOKEN})
    done = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("it has ended\n")
    cluster.wait_for("prefill-0 was told to end; it is not started again")
    assert await describe(address, Trust(TOKEN)) is None
    answer = await asyncio.to_thread(cluster.ask)
    assert answer["usage"]["completion_tokens"] == 4


def test_more_workers_than_cores_take_turns(model: Path, tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with up(tmp_path, str(model)) as cluster:
            os.sched_setaffinity(0, cores)
            cluster.wait_for("Ctrl-C stops everything.")
            assert cluster.fact("compute") == "1 thread for each worker, at most 1 of them at once"
            commands = [child.cmdline() for child in cluster.children()]
            keys = {words[words.index("--compute-slots") + 1] for words in commands if "--compute-slots" in words}
            (key,) = keys
            assert ComputeSlots(int(key)).free() in (0, 1)
            assert cluster.ask()["usage"]["completion_tokens"] == 4
            assert cluster.end(signal.SIGTERM) == 0
            with pytest.raises(OSError, match="semctl"):
                ComputeSlots(int(key))
    finally:
        os.sched_setaffinity(0, cores)


def paste(cluster: Up) -> str:
    """Pastes the banner's request into a shell."""
    text = cluster.said
    command = text[text.index("curl -N") : text.index("\n\nCtrl-C")]
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def served_again(cluster: Up) -> None:
    """Waits until the router has found the worker that was started again."""
    while not await asyncio.to_thread(cluster.ready):
        await asyncio.sleep(0.05)
    answer = await asyncio.to_thread(cluster.ask)
    assert answer["usage"]["completion_tokens"] == 4


def test_the_aggregated_form_serves_a_model_of_the_hub_and_dies_with_its_parent(model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "home" / "hub" / "models--org--small"
    shutil.copytree(model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    home = str(tmp_path / "home")
    with up(tmp_path, "org/small", "--prefill", "0", HF_HOME=home, HF_HUB_OFFLINE="1") as cluster:
        cluster.wait_for("Ctrl-C stops everything.")
        assert cluster.fact("topology").startswith("1 router, 0 prefill, 1 decode (aggregated")
        assert cluster.fact("model") == "small, context 512 tokens"
        assert cluster.fact("folder") == str(cached / "snapshots" / COMMIT)
        assert cluster.fact("KV transport") == "none needed"
        answer = cluster.ask()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("small", 4)
        assert len(cluster.seen) == 2
        assert cluster.end(signal.SIGKILL) == -signal.SIGKILL


def test_a_broken_checkpoint_ends_it_with_the_workers_own_line(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with up(tmp_path, str(broken), "--prefill", "0") as cluster:
        assert cluster.process.wait(START_S) == 3
        assert "tandem: tensor model.layers.2.input_layernorm.weight is missing; expected shape [64]\n" in cluster.said
        assert cluster.said.endswith("tandem: decode-0 ended with status 3\n")
        assert "Traceback" not in cluster.said


def test_it_stops_while_it_starts(model: Path, tmp_path: Path) -> None:
    with up(tmp_path, str(model)) as cluster:
        while len(cluster.children()) < 3:
            time.sleep(0.01)
        assert cluster.end(signal.SIGTERM) == 0
        assert "Traceback" not in cluster.said
        assert "Tandem is up" not in cluster.said


def test_a_worker_that_dies_before_the_cluster_stands_ends_it(model: Path, tmp_path: Path) -> None:
    with up(tmp_path, str(model), "--prefill", "0") as cluster:
        while not (workers := [child for child in cluster.children() if "decode" in child.cmdline()]):
            time.sleep(0.01)
        workers[0].kill()
        assert cluster.process.wait(START_S) == 1
        assert cluster.said.endswith("tandem: decode-0 was ended by SIGKILL\n")
        assert not any(map(runs, cluster.seen))
