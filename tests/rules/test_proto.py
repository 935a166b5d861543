"""The committed messages are what the .proto files generate, and every field is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIELD = re.compile(r"^\s*(?:repeated |optional )?[\w.<>, ]+\s\w+\s*=\s*\d+\s*(?:\[.*\])?;")
GENERATED = Path("tandem/wire/v1")


def uncommented_fields(path: str, text: str) -> list[str]:
    """Fields and enum values with a comment neither behind them nor on the line above."""
    found, above = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        if FIELD.match(line) and "//" not in line and not above.lstrip().startswith("//"):
            found.append(f"{path}:{number}: {line.strip()}")
        above = line
    return found


def differences(fresh: Path, committed: Path) -> list[str]:
    """Names of generated files that differ, are missing or are left over."""
    new = {file.name: file.read_bytes() for file in fresh.glob("*_pb2*")}
    old = {file.name: file.read_bytes() for file in committed.glob("*_pb2*")}
    return sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))


def test_every_field_is_commented(root: Path) -> None:
    files = sorted((root / "proto").rglob("*.proto"))
    assert files
    texts = ((file.relative_to(root).as_posix(), file.read_text()) for file in files)
    assert [line for path, text in texts for line in uncommented_fields(path, text)] == []


@pytest.mark.parametrize(
    "line",
    ["string a = 1;", "repeated uint32 a = 2;", "map<string, int64> a = 3;", "optional b.C a = 4;", "  ROLE_A = 1;"],
)
def test_an_uncommented_field_is_caught(line: str) -> None:
    assert len(uncommented_fields("a.proto", f"message A {{\n{line}\n}}")) == 1
    assert uncommented_fields("a.proto", f"message A {{\n{line}  // why\n}}") == []
    assert uncommented_fields("a.proto", f"message A {{\n  // why\n{line}\n}}") == []


def test_the_committed_messages_are_up_to_date(root: Path, tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make, "make is needed"
    command = [make, "--no-print-directory", "proto", f"OUT={tmp_path}", f"PY={sys.executable}", "MAKEFLAGS="]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path / GENERATED, root / GENERATED) == [], "run `make proto` and commit the result"


def test_a_stale_message_is_caught(tmp_path: Path) -> None:
    for name, files in {"new": {"a_pb2.py": "1", "b_pb2.py": "1"}, "old": {"a_pb2.py": "2", "c_pb2.py": "1"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    assert differences(tmp_path / "new", tmp_path / "old") == ["a_pb2.py", "b_pb2.py", "c_pb2.py"]
    assert differences(tmp_path / "new", tmp_path / "new") == []
