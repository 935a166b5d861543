"""Freed memory goes back to the system from time to time.

glibc gives back only what is free at the end of an arena. Pieces that lie between what is still used stay with the
process, a few kilobytes more for each request of a long day, until a container's limit ends it; `malloc_trim` (glibc,
malloc/malloc.c, since 2.8) gives back every whole page of them.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

EVERY_S = 30.0


def trimmer() -> Callable[[], object] | None:
    """The C library's own; None where it has none (musl, macOS). It releases the interpreter's lock."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))


@asynccontextmanager
async def given_back(every_s: float = EVERY_S) -> AsyncIterator[None]:
    """While it is open. The trimming, a few milliseconds, is done in a thread."""
    task = asyncio.create_task(_give_back(every_s), name="freed-memory")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _give_back(every_s: float) -> None:
    if (trim := trimmer()) is not None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(trim)
