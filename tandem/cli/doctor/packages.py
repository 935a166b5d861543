"""Checks of Python and of the installed packages against the ranges that Tandem is made for."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import tandem
from tandem.cli.doctor.report import Check, Group, State

DISTRIBUTION = "tandem-serve"
PROJECT = Path(tandem.__file__).parents[1] / "pyproject.toml"
WORKERS = "engine"
"""The extra without which nothing but a router runs."""
NOT_FOR_OPERATORS = ("dev", "bench")


def check_packages() -> Group:
    """One line for Python, one for the core, one for each extra."""
    checks = [Check("tandem", f"{tandem.__version__}, Python {platform.python_version()}")]
    checks += [_check(extra, wanted) for extra, wanted in requirements().items() if extra not in NOT_FOR_OPERATORS]
    return Group("packages", checks)


def requirements() -> dict[str, list[Requirement]]:
    """Extra (empty: always needed) -> what it needs: of the installed distribution, or else of the source tree."""
    found: dict[str, list[Requirement]] = {"": []}
    for extra, line in _lines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.setdefault(extra, []).append(requirement)
    return found


def _lines() -> Iterator[tuple[str, str]]:
    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text())["project"]
        yield from (("", line) for line in project["dependencies"])
        for extra, lines in project["optional-dependencies"].items():
            yield from ((extra, line) for line in lines)
        return
    for line in _installed_lines():
        extra = line.partition("extra ==")[2].strip().strip("'\"")
        yield extra, line


def _installed_lines() -> list[str]:
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []


def _check(extra: str, wanted: list[Requirement]) -> Check:
    """An extra that is not there at all is a choice; one that is there in part, or too old, is a fault."""
    name = f"[{extra}]" if extra else "core"
    have = {each.name: _version(each.name) for each in wanted}
    wrong = [each for each in wanted if not each.specifier.contains(have[each.name] or "0", prereleases=True)]
    install = f"pip install {DISTRIBUTION}[{extra}]" if extra else f"pip install {DISTRIBUTION}"
    missing = [each for each in wrong if not have[each.name]]
    own = [each for each in missing if each.name not in ("torch",)]
    if not wrong:
        return Check(name, ", ".join(f"{each} {found}" for each, found in have.items()))
    if extra and own and len(missing) == len(wrong):
        absent = f"not installed: {', '.join(each.name for each in missing)}"
        if extra != WORKERS:
            return Check(name, absent)
        return Check(name, absent, State.WARNING, f"this machine can run a router and no worker; {install}")
    said = ", ".join(f"{each.name} {have[each.name] or 'is missing'} ({each.specifier})" for each in wrong)
    state = State.WARNING if extra and extra != WORKERS else State.ERROR
    return Check(name, f"out of range: {said}", state, f"{install} (wanted: {', '.join(map(_bare, wrong))})")


def _bare(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
