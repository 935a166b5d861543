"""`tandem doctor`: what this machine has, and what Tandem makes of it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import tandem
from kvtransfer.backends import choose
from tandem.device import accelerators
from tandem.engine.kernels.build import cpu_features, find_compiler
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.choose_gpu import UNMEASURED, installed_gpu_kernels

TELLING = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets that decide how fast a model runs."""
PACKAGES = ("torch", "transformers", "nixl-cu12", "flashinfer-python", "triton", "ray")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    about: str
    found: str
    well: bool = True
    """False where something is missing that would make Tandem faster."""


def examine() -> list[Finding]:
    """Looks at everything. Compiles the kernels if that was not done before; may take some seconds then."""
    features = cpu_features()
    compiler = find_compiler()
    kernels = choose_kernels("auto", torch.device("cpu"))
    transports = choose("auto")
    gpu_kernels = installed_gpu_kernels()
    packages = {name: _version(name) for name in PACKAGES}
    return [
        Finding("tandem", f"{tandem.__version__}, Python {platform.python_version()}, {platform.platform()}"),
        Finding("processor", f"{_processor()}, {_cores()} cores"),
        Finding("instruction sets", " ".join(name for name in TELLING if name in features) or "unknown"),
        Finding("threads", f"{torch.get_num_threads()} for a worker that sets none"),
        Finding("compiler", f"{compiler.version} ({compiler.path})" if compiler else "none", compiler is not None),
        Finding("kernels", f"{kernels.name}: {kernels.detail}", kernels.name == "native"),
        Finding("GPU kernels", f"{', '.join(gpu_kernels)} ({UNMEASURED})" if gpu_kernels else "none", not gpu_kernels),
        Finding("overlap of steps", f"off unless asked for: no faster on CPUs; on GPUs {UNMEASURED}"),
        Finding("accelerators", ", ".join(accelerators()) or "none"),
        Finding("KV transport", f"{transports.preferred.name}: {transports.reason}", len(transports.all) > 1),
        Finding("packages", ", ".join(f"{name} {found}" for name, found in packages.items() if found)),
        Finding("not installed", ", ".join(name for name, found in packages.items() if not found) or "nothing"),
    ]


def doctor(as_json: bool) -> None:
    """Prints the report, as a table or as one JSON object."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.about, finding.found, style="" if finding.well else "yellow")
    Console().print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
