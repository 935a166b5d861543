"""Waiting for what has no event to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE_S = 20.0
POLL_S = 0.002


async def eventually(condition: Callable[[], object]) -> None:
    """Polls a condition that another task, thread or process will make true. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what it asks about sets no event
            await asyncio.sleep(POLL_S)
