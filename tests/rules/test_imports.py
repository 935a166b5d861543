"""Import rules that a graph cannot state: light nouns, messages in few hands, a router that runs without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

NOUNS = {"tandem/types.py", "tandem/kv.py", "tandem/cluster.py", "tandem/errors.py"}
MESSAGE_MODULES = {
    "service",
    "dispatch",
    "dispatch_cancels",
    "dispatch_deltas",
    "dispatch_stream",
    "dispatch_submit",
    "fleet",
    "fleet_link",
    "prefill_client",
    "publish",
    "register",
    "registry",
    "codec",
}
PLAIN = "tandem.wire.probe."
"""Speaks in nouns: its callers see no messages."""
MESSAGE_PACKAGES = ("kvtransfer/", "tandem/wire/", "tandem/testing/", "tests/")


def _imported(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def heavy_noun(path: str, text: str) -> list[str]:
    """Imports of a noun module that are neither of the standard library nor another noun."""
    nouns = tuple(noun.removesuffix(".py").replace("/", ".") + "." for noun in NOUNS)
    light = (name for name in _imported(text) if path in NOUNS)
    return [
        f"{path}: {name}"
        for name in light
        if name.split(".")[0] not in sys.stdlib_module_names and not f"{name}.".startswith(nouns)
    ]


def stray_message(path: str, text: str) -> list[str]:
    """Imports of messages by a module that has no business with them."""
    if path.startswith(MESSAGE_PACKAGES) or PurePosixPath(path).stem in MESSAGE_MODULES:
        return []
    names = (name for name in _imported(text) if f"{name}.".startswith("tandem.wire."))
    return [f"{path}: {name}" for name in names if not f"{name}.".startswith(PLAIN)]


def test_nouns_need_the_standard_library_only(sources: dict[str, str]) -> None:
    assert set(sources) >= NOUNS
    assert [line for path, text in sources.items() for line in heavy_noun(path, text)] == []


def test_messages_are_touched_in_few_places(sources: dict[str, str]) -> None:
    assert [line for path, text in sources.items() for line in stray_message(path, text)] == []


@pytest.mark.parametrize("text", ["import numpy", "from tandem.config import dump", "def f():\n    import torch"])
def test_a_heavy_noun_is_caught(text: str) -> None:
    assert len(heavy_noun("tandem/kv.py", text)) == 1
    assert heavy_noun("tandem/text.py", text) == []


def test_light_imports_of_a_noun_pass() -> None:
    text = "import struct\nfrom collections.abc import Iterator\nfrom tandem.types import ModelInfo"
    assert heavy_noun("tandem/cluster.py", text) == []


@pytest.mark.parametrize(
    "text", ["from tandem.wire.v1 import common_pb2", "import tandem.wire.codec", "from tandem.wire import codec"]
)
def test_a_stray_message_is_caught(text: str) -> None:
    assert len(stray_message("router/http/app.py", text)) == 1
    assert stray_message("router/workers/fleet.py", text) == []
    assert stray_message("kvtransfer/base.py", text) == []


def test_asking_in_nouns_passes() -> None:
    assert stray_message("router/http/app.py", "from tandem.wire.probe import describe") == []


WITHOUT_TORCH = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    importlib.import_module(module.name)
"""


def _import_all(package: str, refused: set[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(package=package, refused=refused)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_the_router_runs_without_torch(root: Path) -> None:
    done = _import_all("router", {"torch", "safetensors", "nixl_cu12", "nixl"}, root)
    assert done.returncode == 0, done.stderr


def test_a_hidden_import_of_torch_is_caught(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text("")
    (tmp_path / "planted" / "module.py").write_text("def f(): ...\nimport torch\n")
    done = _import_all("planted", {"torch"}, tmp_path)
    assert done.returncode != 0
    assert "refused: torch" in done.stderr
