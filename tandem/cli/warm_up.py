"""What a launcher waits for before it says that its cluster stands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx

from tandem.cluster import WorkerInfo
from tandem.errors import Unavailable

START_LIMIT_S = 600.0
"""A large checkpoint may take minutes to load; a worker that dies ends the wait at once."""
POLL_S = 0.1
WARM_TOKENS = 256

T = TypeVar("T")


async def until(probe: Callable[[], Awaitable[T | None]], who: str) -> T:
    """The first answer of `probe`. Raises Unavailable when there is none within the start's limit."""
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while True:
                if (answer := await probe()) is not None:
                    return answer
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"{who} did not answer within {START_LIMIT_S:.0f} s") from None


async def router_ready(url: str) -> bool | None:
    """Whether the router at `url` sees workers for both phases; None while it does not."""
    async with httpx.AsyncClient(trust_env=False) as client:  # no proxy stands between it and its own router
        try:
            return True if (await client.get(url + "/ready", timeout=2.0)).status_code == 200 else None
        except httpx.HTTPError:
            return None


def warming_requests(infos: Sequence[WorkerInfo]) -> list[dict[str, Any]]:
    """Completions that together use every process: two for each worker, all different."""
    model = infos[0].model
    length = max(1, min(WARM_TOKENS, model.max_context // 2, model.vocab_size - 1))
    prompts = [[(at + row) % length for at in range(length)] for row in range(2 * len(infos))]
    return [{"model": model.name, "prompt": prompt, "max_tokens": 2} for prompt in prompts]


async def warm_up(url: str, bodies: Sequence[dict[str, Any]], token: str = "") -> None:
    """Sends a few requests through every process, so that no user's request pays for first times.

    token: the cluster's, where clients need keys. Raises Unavailable.
    """
    shown = {"authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=url, timeout=START_LIMIT_S, headers=shown, trust_env=False) as client:
        try:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        except httpx.HTTPError as error:
            raise Unavailable(f"the warm-up failed: {error!r}") from None
    for answer in answers:
        if answer.status_code != 200:
            raise Unavailable(f"the warm-up failed: {answer.text}")
