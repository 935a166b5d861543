"""Checks of the machine: processor, memory, limits, clock, and folders that must be written."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path

from tandem.cli.doctor.report import Check, Group, State, ok_or
from tandem.config import cache_folder
from tandem.ports import OWN_DESCRIPTORS

GIB = 1 << 30
SHM = Path("/dev/shm")  # noqa: S108 - looked at, not written
LEAST_SHM = GIB
CONNECTIONS = 8192
"""Default of `--max-connections`."""
RDMA = Path("/sys/class/infiniband")
LEAST_LOCKED = GIB
"""Landing slabs (512 MiB by default), staging, and what the transport registers itself."""
TIMEX_BYTES = 512
"""More than the kernel's `struct timex` has."""
CLOCK_UNSYNCHRONISED = 5


def check_machine() -> Group:
    """Everything below."""
    checks = [_processor(), _memory(), _shared_memory(), _open_files(), _locked_memory(), _clock(), _cache()]
    return Group("machine", checks)


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("processor", f"{_processor_name()}, {cores} cores, {platform.platform()}")


def _processor_name() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that processes could still have, where Linux says so."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _memory() -> Check:
    available = available_memory()
    if available is None:
        return Check("memory", "unknown: this system does not say")
    fix = "stop what else runs here; a worker needs its weights, --kv-mib and a few hundred MiB"
    return ok_or(f"{available / GIB:.1f} GiB available", "memory", available >= GIB, fix)


def _shared_memory(path: Path = SHM) -> Check:
    if not path.is_dir():
        return Check("shared memory", f"there is no {path}", State.WARNING, f"mount a tmpfs at {path}")
    usage = shutil.disk_usage(path)
    fix = (
        "transports between workers of one machine need more: docker run --shm-size=2g; on Kubernetes an emptyDir with "
        f"medium Memory at {path}"
    )
    found = f"{path} has {usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    return ok_or(found, "shared memory", usage.free >= LEAST_SHM, fix)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OWN_DESCRIPTORS
    fix = f"ulimit -n {wanted} or LimitNOFILE={wanted} where the router is started; or set --max-connections lower"
    fine = hard == resource.RLIM_INFINITY or hard >= wanted
    return ok_or(f"{_limit(soft)}, can be raised to {_limit(hard)}", "open files", fine, fix)


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    devices = sorted(path.name for path in RDMA.iterdir()) if RDMA.is_dir() else []
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / GIB:.3g} GiB"
    found += f"; RDMA devices: {', '.join(devices)}" if devices else "; no RDMA device, which would need it"
    fix = "ulimit -l unlimited or LimitMEMLOCK=infinity; on Kubernetes the capability IPC_LOCK"
    fine = not devices or soft == resource.RLIM_INFINITY or soft >= LEAST_LOCKED
    return ok_or(found, "locked memory", fine, fix)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _clock() -> Check:
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        return Check("clock", "unknown: this system does not say whether it is synchronised")
    fine = state != CLOCK_UNSYNCHRONISED
    found = "synchronised" if fine else "the kernel says that it is not synchronised"
    return ok_or(found, "clock", fine, "run chrony or systemd-timesyncd, or logs and traces of machines do not line up")


def _cache() -> Check:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        fix = "make it writable, or let XDG_CACHE_HOME name a folder that is: compiled kernels are kept there"
        return Check("cache folder", f"{folder} cannot be written: {error.strerror}", State.ERROR, fix)
    fix = "free some space: compiled kernels are kept there"
    return ok_or(f"{folder}, {free / GIB:.1f} GiB free", "cache folder", free >= GIB // 10, fix)
