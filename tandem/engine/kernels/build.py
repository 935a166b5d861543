"""Compiles the kernels in `cpu/` with the machine's own compiler, once for each machine and version.

The library goes into the user's cache under a name that is a digest of everything it depends on, so that an upgrade of
Tandem, of the compiler or of the processor makes a new one. Workers that start together compile once: one holds the
lock, the others wait for it, and the finished file appears by renaming.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
LIMIT_S = 300.0
VERSION_S = 30.0
"""For a compiler to say what it is."""


class KernelsUnavailable(Exception):
    """Why there are no native kernels on this machine, in one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and the first line of what it says of itself."""

    path: str
    version: str


def find_compiler(names: Sequence[str] = COMPILERS) -> Compiler | None:
    """The first of `names` on the search path that answers `--version`, or None."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, errors="replace", timeout=VERSION_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("%s is no compiler that could be used: %s", path, error)
            continue
        if done.returncode == 0:
            return Compiler(path, done.stdout.partition("\n")[0].strip())
    return None


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this processor as Linux names them, sorted; empty where it does not say."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def build_library(compiler: Compiler | None, cache: Path) -> Path:
    """The shared library of the kernels, compiled into `cache` unless it is there already.

    Raises KernelsUnavailable when there is no compiler, the cache cannot be written, or the compiler fails.
    """
    if compiler is None:
        raise KernelsUnavailable(f"no C++ compiler is installed ({', '.join(COMPILERS)})")
    sources = sorted(SOURCES.glob("*.cpp"))
    target = cache / f"kernels-{_digest(compiler)}.so"
    if target.exists():
        return target
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (cache / "kernels.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, sources, target)
    except OSError as error:
        raise KernelsUnavailable(f"{cache} cannot be written: {error.strerror or error}") from None
    return target


def _digest(compiler: Compiler) -> str:
    state = hashlib.blake2b(digest_size=12)
    parts = [platform.machine(), compiler.path, compiler.version, *FLAGS, *cpu_features()]
    parts += [part for file in sorted(SOURCES.iterdir()) if file.is_file() for part in (file.name, file.read_text())]
    for part in parts:
        state.update(f"{len(part)}:{part}".encode())
    return state.hexdigest()


def _compile(compiler: Compiler, sources: Sequence[Path], target: Path) -> None:
    """With OpenMP where the compiler has it; without, the kernels run on one thread."""
    log.info("compiling the CPU kernels with %s (once; into %s)", compiler.version, target.parent)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler.path, *FLAGS, *map(str, sources), "-o", str(made)]
        failure = _run([*command, "-fopenmp"])
        if failure:
            log.warning("the CPU kernels get one thread: compiling them with OpenMP failed: %s", failure)
            failure = _run(command)
        if failure:
            raise KernelsUnavailable(f"{compiler.path} failed: {failure}")
        made.replace(target)
    log.info("the CPU kernels were compiled in %.1f s", time.monotonic() - started)


def _run(command: Sequence[str]) -> str:
    """Runs a compiler; returns why it failed in one line, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it took longer than {LIMIT_S:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    return (lines or [f"exit code {done.returncode}"])[0].strip()[:300]
