"""Folders are where the design has them, tests mirror packages, and the wheel is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from setuptools import find_packages

PACKAGES = {"tandem", "router", "prefill_worker", "decode_worker", "kvtransfer"}
TOP = PACKAGES | {"proto", "deploy", "helm", "tests", "benchmarks", "docs"}
BESIDE_PACKAGES = {"e2e", "rules", "security", "benchmarks", "deploy", "helm"}


def misplaced(top: set[str]) -> list[str]:
    return sorted(
        [f"{name}/ is not in the layout" for name in top - TOP] + [f"{name}/ is missing" for name in TOP - top]
    )


def unmirrored(tests: set[str], packages: set[str]) -> list[str]:
    """tests: folders with tests. packages: dotted names; a sub-package may be mirrored by its last part alone."""
    known = packages | {name.rpartition(".")[2] for name in packages} | BESIDE_PACKAGES
    stray = [f"tests/{name}/ mirrors no package" for name in tests - known]
    return sorted(stray + [f"{name} has no tests" for name in PACKAGES - tests])


def without_init(files: set[str]) -> list[str]:
    """Folders of the packages that setuptools would leave out."""
    folders = {PurePosixPath(file).parent for file in files if file.endswith(".py")}
    return sorted(str(folder) for folder in folders if f"{folder}/__init__.py" not in files)


def unread(settings: dict[str, list[str]], product: dict[str, str]) -> list[str]:
    """Settings that no code outside the schema mentions as an attribute."""
    read = {
        name
        for path, text in product.items()
        if not path.startswith("tandem/config/")
        for name in re.findall(r"\.(\w+)", text)
    }
    return [f"{owner}.{name}" for owner, names in settings.items() for name in names if name not in read]


def settings_of(text: str) -> dict[str, list[str]]:
    """Class -> annotated fields."""
    classes = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return {
        node.name: [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        for node in classes
    }


def test_the_top_level_is_as_designed(root: Path) -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listing.stdout.splitlines() if "/" in name}
    assert misplaced({name for name in top if not name.startswith(".")}) == []


def test_tests_mirror_packages(root: Path) -> None:
    tests = {file.relative_to(root / "tests").parts[0] for file in (root / "tests").glob("*/**/test_*.py")}
    packages = set(find_packages(str(root), include=[pattern for p in PACKAGES for pattern in (p, f"{p}.*")]))
    assert unmirrored(tests, packages) == []


def test_tests_are_no_packages(root: Path) -> None:
    assert [str(file) for file in (root / "tests").rglob("__init__.py")] == []


def test_the_wheel_holds_every_module(root: Path, product: dict[str, str]) -> None:
    assert without_init({*product, "tandem/wire/v1/common_pb2.py", "tandem/wire/v1/__init__.py"}) == []
    include = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(root), include=include))
    folders = {PurePosixPath(path).parent.as_posix().replace("/", ".") for path in product}
    assert folders - found == set()
    assert {name for name in found if name.split(".")[0] not in PACKAGES} == set()
    assert [name for name in sorted(PACKAGES) if not (root / name / "py.typed").is_file()] == []


def test_every_setting_is_read(product: dict[str, str]) -> None:
    settings = {
        owner: names
        for path, text in product.items()
        if path.startswith("tandem/config/")
        for owner, names in settings_of(text).items()
    }
    settings["Settings"].remove("config")  # read before there is an object to read it from
    assert unread(settings, product) == []


def test_a_misplaced_folder_is_caught() -> None:
    assert misplaced(TOP) == []
    assert misplaced(TOP - {"docs"} | {"scripts"}) == ["docs/ is missing", "scripts/ is not in the layout"]


def test_a_test_folder_without_a_package_is_caught() -> None:
    assert unmirrored(PACKAGES | {"engine", "e2e"}, {"tandem", "tandem.engine"} | PACKAGES) == []
    assert unmirrored(PACKAGES - {"router"} | {"other"}, PACKAGES) == [
        "router has no tests",
        "tests/other/ mirrors no package",
    ]


def test_a_folder_without_init_is_caught() -> None:
    assert without_init({"router/__init__.py", "router/policies/cost.py"}) == ["router/policies"]


def test_an_unread_setting_is_caught() -> None:
    settings = settings_of("class A:\n    used: int = 1\n    unused: int = 2\n    def f(self): ...")
    assert settings == {"A": ["used", "unused"]}
    assert unread(settings, {"a.py": "config.used", "tandem/config/up.py": "self.unused"}) == ["A.unused"]
