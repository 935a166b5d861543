"""Freed memory goes back to the system, from wherever it was."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys

import pytest

from tandem.freed_memory import given_back

HOLES = """
import ctypes, psutil
from tandem.freed_memory import trimmer

libc, process = ctypes.CDLL(None), psutil.Process()
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(ctypes.c_size_t(16384)) for _ in range(8192)]
for block in blocks:
    ctypes.memset(block, 1, 16384)
full = process.memory_info().rss
for block in blocks[::2]:
    libc.free(block)
freed = process.memory_info().rss
trimmer()()
print(full, freed, process.memory_info().rss)
"""
"""Every second one of many blocks is freed: none of that is at the end of the heap. In a process of its own."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_memory_between_what_is_used_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    full, freed, trimmed = (int(figure) for figure in done.stdout.split())
    half = 8192 * 16384 // 2
    assert full - freed < half // 2, "the C library gave it back by itself"
    assert freed - trimmed > half // 2


async def test_it_goes_on_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = asyncio.Event()
    loop, times = asyncio.get_running_loop(), []

    def trim() -> None:
        times.append(1)
        if len(times) == 3:
            loop.call_soon_threadsafe(trimmed.set)

    monkeypatch.setattr("tandem.freed_memory.trimmer", lambda: trim)
    async with given_back(0.001), asyncio.timeout(10):
        await trimmed.wait()
    assert not any(task.get_name() == "freed-memory" for task in asyncio.all_tasks())
