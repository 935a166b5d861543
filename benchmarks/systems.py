"""The servers a comparison starts: Tandem in any form, vLLM, vLLM's own pair over NIXL, Hugging Face.

What takes long to start is started once and stopped (SIGSTOP) while others are measured, so that it takes no core from
them: vLLM's NIXL thread keeps one busy even when idle. Tandem starts in seconds and is started anew for every round.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.baselines import BASELINES
from tandem.config import child_environment
from tandem.ports import free_ports

START_S = 400.0
STOP_S = 15.0
TANDEM = re.compile(r"tandem-(\d+)p(\d+)d(?:-(\w+))?")
NAMES = "tandem-1p1d (1 prefill, 1 decode; any numbers; a policy may follow: tandem-4p2d-sglang), vllm, vllm-pd, hf"


class StartError(Exception):
    """A server did not come up; says where its output is."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Where other people's programs are."""

    scripts: Path | None = None
    """The folder with vllm-pd.sh."""
    vllm: Path | None = None
    """The folder that setup-vllm-cpu.sh was given."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems of a comparison get alike."""

    model: Path
    dtype: str = "bfloat16"
    context: int = 4096
    kv_gib: int = 1
    """KV memory of each engine."""
    kv_mib: int = 0
    """Of each of Tandem's workers, where another amount is wanted."""


@dataclass(slots=True)
class Server:
    """A process group behind one HTTP port."""

    name: str
    command: list[str]
    url: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    keep: bool = False
    """Stop and continue it instead of starting it for every round."""
    ready: str = "/v1/models"
    """Answered with 200 once requests are."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers. Raises StartError."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=child_environment(dict(self.environment)), process_group=0
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise StartError(f"{self.name} did not start; its output is in {self.log}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url + self.ready, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its URL, while it is the one that may use the cores. Raises StartError."""
        if self.process is None:
            self.start()
        else:
            self._signal(signal.SIGCONT)
        try:
            yield self.url
        finally:
            if self.keep:
                self._signal(signal.SIGSTOP)
            else:
                self.end()

    def end(self) -> None:
        """Ends the whole group, and waits."""
        if self.process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _signal(self, number: int) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


def server(name: str, setting: Setting, peers: Peers, folder: Path) -> Server:
    """A system by its name; logs go to `folder`. Raises ValueError with what is missing."""
    (port,) = free_ports(1)
    url, log = f"http://127.0.0.1:{port}", folder / f"{name}.log"
    if form := TANDEM.fullmatch(name):
        return Server(name, _tandem(setting, port, *form.groups()), url, log, ready="/ready")
    if name == "vllm":
        return Server(name, _vllm(setting, port, _installed(peers)), url, log, _vllm_environment(setting), keep=True)
    if name == "vllm-pd":
        script = (peers.scripts or Path()) / "vllm-pd.sh"
        if peers.scripts is None or not script.is_file():
            raise ValueError("vllm-pd needs --peers, the folder that holds vllm-pd.sh")
        command = ["bash", str(script), str(_installed(peers)), str(setting.model), str(port)]
        return Server(name, command, url, log, _vllm_environment(setting), keep=True)
    if name == "hf":
        options = ["--port", str(port), "--dtype", setting.dtype, "--threads", str(len(os.sched_getaffinity(0)))]
        command = [sys.executable, "-m", "benchmarks.hf_server", str(setting.model), *options]
        return Server(name, command, url, log, {"HF_HUB_OFFLINE": "1"}, keep=True)
    raise ValueError(f"system is {name}; it must be one of {NAMES}")


def _tandem(setting: Setting, port: int, prefill: str, decode: str, policy: str | None) -> list[str]:
    command = [sys.executable, "-m", "tandem.cli", "up", str(setting.model), "--port", str(port)]
    if policy in BASELINES:
        command[2:4] = ["benchmarks.up", policy]
    elif policy is not None:
        command += ["--policy", policy]
    command += ["--prefill", prefill, "--decode", decode, "--dtype", setting.dtype]
    return [*command, "--kv-mib", str(setting.kv_mib or setting.kv_gib * 1024), "--log-level", "warning"]


def _installed(peers: Peers) -> Path:
    if peers.vllm is None or not (peers.vllm / ".venv/bin/vllm").is_file():
        raise ValueError("vllm needs --vllm, the folder that setup-vllm-cpu.sh was given")
    return peers.vllm


def _vllm(setting: Setting, port: int, installed: Path) -> list[str]:
    command = [str(installed / ".venv/bin/vllm"), "serve", str(setting.model), "--port", str(port)]
    command += ["--dtype", setting.dtype, "--max-model-len", str(setting.context)]
    return [*command, "--enable-prompt-tokens-details"]


def _vllm_environment(setting: Setting) -> dict[str, str]:
    kv = str(setting.kv_gib)
    return {
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": kv,
        "VLLM_NO_USAGE_STATS": "1",
    }
