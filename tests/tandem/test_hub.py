"""Where models are found: folders, the shipped one, and a hub, played here by a small server on loopback."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tandem.demo
from tandem.config import child_environment
from tandem.errors import ConfigError
from tandem.hub import resolve_model, served_name

FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "chat_templates/tool_use.jinja": b"tools",
    "checkpoint-1/config.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.json": b"{}",
    "README.md": b"read me",
}
SETTINGS = {"config.json", "tokenizer.json", "chat_template.jinja", "chat_templates/tool_use.jinja"}
COMMIT = "c" * 40
ROOT = Path(tandem.demo.__file__).parents[2]


class FakeHub(BaseHTTPRequestHandler):
    """Two models: `org/open` holds FILES, `org/gated` is refused. Everything else does not exist."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/open/tree/"):
            listing = [{"type": "file", "path": name, "size": len(b), "oid": _tag(b)} for name, b in FILES.items()]
            self._send(200, json.dumps(listing).encode(), with_body)
        elif path.startswith("/api/models/org/open"):
            siblings = [{"rfilename": name} for name in FILES]
            card = {"_id": "1", "id": "org/open", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self._send(200, json.dumps(card).encode(), with_body)
        elif path.startswith(f"/org/open/resolve/{COMMIT}/"):
            body = FILES[path.split(f"{COMMIT}/")[1]]
            self._send(200, body, with_body, {"ETag": f'"{_tag(body)}"', "X-Repo-Commit": COMMIT})
        elif "org/gated" in path:
            self._send(403, b"{}", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        else:
            self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        pass


def _tag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()  # noqa: S324 - as git names blobs


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The URL of a hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


CODE = """
import sys
from tandem.errors import ConfigError
from tandem.hub import resolve_model
try:
    print(resolve_model(sys.argv[1], weights=sys.argv[2] == "weights"))
except ConfigError as error:
    print("refused:", error)
assert "torch" not in sys.modules
"""


def resolve(endpoint: str, home: Path, model: str, weights: str = "weights", offline: str = "0") -> str:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    environment = child_environment(settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    done = subprocess.run(
        [sys.executable, "-c", CODE, model, weights],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def stored(folder: str) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()}


def test_a_hub_id_is_downloaded_once_and_then_found_offline(hub: str, tmp_path: Path) -> None:
    folder = resolve(hub, tmp_path, "org/open")
    assert stored(folder) == {*SETTINGS, "model.safetensors"}
    assert (Path(folder) / "config.json").read_bytes() == FILES["config.json"]
    assert resolve(hub, tmp_path, "org/open", offline="1") == folder


def test_a_router_takes_no_weights(hub: str, tmp_path: Path) -> None:
    folder = resolve(hub, tmp_path, "org/open", weights="none")
    assert stored(folder) == SETTINGS


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("org/none", "the hub has no such model, or it is private and HF_TOKEN gives no access"),
        ("org/gated", "the hub gives it only to accounts that were granted access; set HF_TOKEN to a token of one"),
        ("not--valid..", "not a hub id either: "),
    ],
)
def test_what_the_hub_does_not_give_is_explained(hub: str, tmp_path: Path, model: str, reason: str) -> None:
    said = resolve(hub, tmp_path, model)
    assert said.startswith(f"refused: model is {model}, which is no folder here, and {reason}")
    assert "\n" not in said


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_told_apart(tmp_path: Path, offline: str) -> None:
    said = resolve("http://127.0.0.1:9", tmp_path, "org/open", offline=offline)
    assert "it is not in the hub's cache, and the hub cannot be reached" in said
    assert "\n" not in said


def test_folders_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("org/model") == str(tmp_path / "org" / "model")


def test_demo_is_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tandem.demo, "MODEL_PATH", tmp_path)
    assert resolve_model("demo") == str(tmp_path)
    monkeypatch.setattr(tandem.demo, "MODEL_PATH", tmp_path / "none")
    with pytest.raises(ConfigError, match="this installation has no model at"):
        resolve_model("demo")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "model is empty; a folder or a hub id is needed"),
        ("./none", "model is ./none; there is no such folder"),
        ("/no/such/folder", "model is /no/such/folder; there is no such folder"),
        ("a/b/c", "model is a/b/c; there is no such folder"),
        (__file__, f"model is {__file__}, which is a file; the folder it lies in is needed"),
    ],
)
def test_what_cannot_be_a_hub_id_is_not_looked_for_there(model: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(model)
    assert (str(caught.value), caught.value.param) == (said, "model")


def test_served_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert served_name("demo") == "tandem-demo"
    assert served_name("org/Model-1B") == "Model-1B"
    assert served_name("/models/llama/") == "llama"
    assert served_name(".") == tmp_path.name
