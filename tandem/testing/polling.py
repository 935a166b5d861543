"""Waiting for what has no event to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 20.0
POLL_S = 0.002
WAIT_S = 0.02


async def eventually(condition: Callable[[], object]) -> None:
    """Polls a condition that another task, thread or process will make true. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what it asks about sets no event
            await asyncio.sleep(POLL_S)


def wait_for(condition: Callable[[], object], said: Callable[[], str], within_s: float = PATIENCE_S) -> None:
    """As `eventually`, of other processes, where no event loop runs. said: the message of the AssertionError."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(WAIT_S)
