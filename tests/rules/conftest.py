"""What the structure rules look at: the text of every Python file that is written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tandem", "router", "prefill_worker", "decode_worker", "kvtransfer", "tests", "benchmarks", "deploy", "helm")
GENERATED = "tandem/wire/v1/"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Path from the root -> text, generated code left out."""
    files = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))
    named = ((file.relative_to(ROOT).as_posix(), file) for file in files)
    return {name: file.read_text() for name, file in named if not name.startswith(GENERATED)}


@pytest.fixture(scope="session")
def product(sources: dict[str, str]) -> dict[str, str]:
    """Of the sources, those that are installed."""
    packages = ("tandem/", "router/", "prefill_worker/", "decode_worker/", "kvtransfer/")
    return {name: text for name, text in sources.items() if name.startswith(packages)}
