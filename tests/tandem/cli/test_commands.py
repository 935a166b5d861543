"""What each command says about settings and checkpoints that are wrong: an exit code and one line."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import tandem
from tandem.config import child_environment
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint

ROOT = Path(tandem.__file__).parents[1]
WRONG_SETTING, WRONG_CHECKPOINT = 2, 3
TAKEN = r"\d+ cannot be listened on: address already in use; stop what listens there, or give another port"

DRIVER = """
import contextlib, io, json, sys
sys.modules["nixl"] = sys.modules["nixl_cu12"] = sys.modules["nixl_cu13"] = None
from tandem.cli.app import run
for name, arguments in json.load(sys.stdin).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = run(arguments)
    print(json.dumps([name, status, said.getvalue()]))
"""
"""All commands in one process, which pays for torch once; without NIXL."""


@dataclass(frozen=True)
class Case:
    """A command line, and what must come of it. {model} and {port}: a good checkpoint, a port that is taken."""

    command: str
    says: str
    """A regular expression for the whole line behind `tandem: `."""
    status: int = WRONG_SETTING


CASES = {
    "no such folder": Case("prefill /no/such", "model is /no/such; there is no such folder"),
    "no such hub model": Case("decode org/none", "model is org/none, .* the hub cannot be reached: .*"),
    "router, no such hub model": Case("router --model org/none", "model is org/none, .* the hub cannot be reached: .*"),
    "unknown tool parser": Case(
        "router --tool-parser gpt", "--tool-parser: must be one of auto, none, .*hermes.*'gpt'.*"
    ),
    "unknown reasoning parser": Case("up {model} --reasoning-parser r2", "--reasoning-parser: must be one of auto, .*"),
    "up, no such folder": Case("up ./none --port 0", "model is ./none; there is no such folder"),
    "no model": Case("decode", "MODEL: Field required"),
    "HTTP port": Case(
        "router --port {port}",
        rf"--port: 127.0.0.1:{TAKEN}",
    ),
    "control port": Case(
        "router --port 0 --control-port {port}",
        rf"--control-port: 127.0.0.1:{TAKEN}",
    ),
    "up's port": Case(
        "up {model} --port {port}",
        rf"--port: 127.0.0.1:{TAKEN}",
    ),
    "worker's port": Case(
        "prefill {model} --port {port}",
        rf"--port: 127.0.0.1:{TAKEN}",
    ),
    "metrics port": Case(
        "decode {model} --metrics-port {port}",
        rf"--metrics-port: 127.0.0.1:{TAKEN}",
    ),
    "foreign host": Case(
        "decode {model} --host 192.0.2.1 --tls-cert {model}/config.json --tls-key {model}/config.json "
        "--tls-ca {model}/config.json",
        r"--host is 192.0.2.1; whoever reaches it could read the metrics: set TANDEM_METRICS_TOKEN, .*",
    ),
    "negative": Case("router --port -4", r"--port: Input should be greater than or equal to 0 \(got -4\)"),
    "too large": Case("up {model} --prefill 65", r"--prefill: Input should be less than or equal to 64 \(got 65\)"),
    "no number": Case("router --port abc", "Invalid value for '--port': .* valid integer, unable to parse .*"),
    "unknown word": Case("router --policy best", "Invalid value for '--policy': .*'best' is not one of 'cost', .*"),
    "unknown number": Case("decode {model} --page-size 3", r"--page-size: Input should be 1, 2, .* 64 \(got 3\)"),
    "two at once": Case("router --retries 11 --lease-s 0", "--lease-s: .*; --retries: .*"),
    "up beyond loopback": Case(
        "up {model} --host 0.0.0.0", "--host is 0.0.0.0; whoever .*: give --api-keys FILE, or listen on 127.0.0.1"
    ),
    "unknown flag": Case("router --bogus 1", "No such option: --bogus.*"),
    "unknown command": Case("serve", "No such command 'serve'."),
    "no such file": Case("router --config /no/such.yaml", "--config is /no/such.yaml; there is no such file"),
    "unknown key": Case(
        "router --config {folder}/unknown.yaml",
        "--config: the file sets prefill, which is no setting of `tandem router`",
    ),
    "wrong value in the file": Case("router --config {folder}/wrong.yaml", "--port: .* valid integer.*"),
    "no YAML": Case(
        "router --config {folder}/broken.yaml", "--config is .*; it must be a YAML mapping of settings: .*"
    ),
    "no such device": Case(
        "decode {model} --device cuda:99", r"device is 'cuda:99'; this machine has \d+ CUDA devices"
    ),
    "unknown device": Case("prefill {model} --device tpu9x", "device is 'tpu9x'; expected cpu, cuda or cuda:N"),
    "no room for a page": Case(
        "decode {model} --kv-mib 0.0001", r"kv_mib is 0.0001; one page of this model needs [\d.]+"
    ),
    "context too long": Case(
        "decode {model} --kv-mib 1 --max-context 4097", "max_context is 4097; the model serves at most 512"
    ),
    "no NIXL": Case(
        "decode {model} --transport nixl",
        "transport is nixl, but it cannot be used here: no NIXL wheel is installed",
    ),
    "no config.json": Case(
        "decode {folder}/no-config", "cannot read .*/config.json: No such file or directory", WRONG_CHECKPOINT
    ),
    "no tensors": Case("prefill {folder}/no-tensors", ".* holds neither model.safetensors nor .*", WRONG_CHECKPOINT),
    "tensor missing": Case(
        "decode {folder}/missing", r"tensor model.norm.weight is missing; expected shape \[64\]", WRONG_CHECKPOINT
    ),
    "tensor of another shape": Case(
        "decode {folder}/shape", r"tensor model.norm.weight has shape \[65\]; expected \[64\] .*", WRONG_CHECKPOINT
    ),
    "file cut short": Case("decode {folder}/short", ".*/model.safetensors is cut short: .*", WRONG_CHECKPOINT),
    "empty file": Case("decode {folder}/empty", ".*/model.safetensors is cut short: 0 bytes", WRONG_CHECKPOINT),
    "unknown architecture": Case(
        "decode {folder}/architecture",
        ".*: architecture MambaForCausalLM is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM.*",
        WRONG_CHECKPOINT,
    ),
    "unknown rotary scaling": Case(
        "decode {folder}/rope", ".*: rope_type is 'spiral'; supported are default, .*", WRONG_CHECKPOINT
    ),
}


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def edit_norm(size: int) -> Callable[[Path], None]:
    """Gives the last norm another size, or removes it for 0."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        with safe_open(str(file), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        norm = tensors.pop("model.norm.weight")
        save_file(tensors | ({"model.norm.weight": norm.new_ones(size)} if size else {}), file)

    return edit


BROKEN: dict[str, Callable[[Path], object]] = {
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "no-tensors": lambda folder: (folder / "model.safetensors").unlink(),
    "missing": edit_norm(0),
    "shape": edit_norm(65),
    "short": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]
    ),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "architecture": edit_config(architectures=["MambaForCausalLM"]),
    "rope": edit_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings files, and checkpoints: `good` and every broken one."""
    made = tmp_path_factory.mktemp("commands")
    good = make_checkpoint(made / "good", CheckpointSpec(layers=1, vocab=300, max_positions=512))
    for name, spoil in BROKEN.items():
        shutil.copytree(good, made / name)
        spoil(made / name)
    (made / "unknown.yaml").write_text("port: 0\nprefill: 3\n")
    (made / "wrong.yaml").write_text("port: many\n")
    (made / "broken.yaml").write_text("port: [1\n")
    return made


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def start(*command: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=child_environment(settings),
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes(folder: Path, taken: int) -> dict[str, tuple[int, str]]:
    """Case -> exit code and what was said."""
    values = {"model": str(folder / "good"), "folder": str(folder), "port": str(taken)}
    commands = {name: [*case.command.format(**values).split(), "--log-level", "error"] for name, case in CASES.items()}
    del commands["unknown command"][-2:]
    done = start("-c", DRIVER, folder=folder, given=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return {name: (status, said) for name, status, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_in_one_line(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, said = outcomes[name]
    assert status == CASES[name].status, said
    assert re.fullmatch(f"tandem: {CASES[name].says}\n", said), said


@pytest.mark.parametrize(("name", "status"), [("good", WRONG_SETTING), ("rope", WRONG_CHECKPOINT)])
def test_a_process_says_the_same(folder: Path, name: str, status: int) -> None:
    done = start("-m", "tandem.cli", "decode", str(folder / name), "--kv-mib", "0.0001", folder=folder)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tandem: ")


def test_help_names_every_setting_and_needs_no_torch(folder: Path) -> None:
    code = "import sys; from tandem.cli.app import run; run(['decode', '--help']); assert 'torch' not in sys.modules"
    done = start("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "--slab-mib" in done.stdout


def test_the_router_is_started_without_torch(folder: Path, taken: int) -> None:
    arguments = ["router", "--model", str(folder / "good"), "--port", "0", "--control-port", str(taken)]
    code = (
        f"import sys; from tandem.cli.app import run; assert run({arguments}) == 2; assert 'torch' not in sys.modules"
    )
    done = start("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "--control-port" in done.stderr
