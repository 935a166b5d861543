"""Asks conversations of an endpoint: at random times, in a closed loop, or when a trace says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.client import Client, Sample
from benchmarks.workloads import Conversation

DETAILS = 3
"""Errors of a kind that are shown in full."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. One of `concurrency`, `rate` and a trace's own times decides."""

    concurrency: int = 0
    """Clients that each ask the next conversation when theirs has ended; with a rate, the most open ones (0: any)."""
    rate: float = 0.0
    """Conversations a second, with exponential gaps; 0 is the closed loop."""
    speed: float = 0.0
    """A trace's times are divided by this; 0 ignores them."""
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.concurrency < 0 or self.rate < 0 or self.speed < 0 or self.timeout_s <= 0:
            raise ValueError("concurrency, rate and speed must not be below 0, and timeout must be above")
        if not (self.concurrency or self.rate or self.speed):
            raise ValueError("concurrency, rate or a trace's speed is needed")

    def arrivals(self, conversations: Sequence[Conversation]) -> list[float]:
        """Seconds after the start at which each conversation starts, at the earliest."""
        if self.speed:
            if any(each.at_s is None for each in conversations):
                raise ValueError("speed is for traces; this workload has no times of its own")
            return [(each.at_s or 0.0) / self.speed for each in conversations]
        if not self.rate:
            return [0.0] * len(conversations)
        rng, now, times = random.Random(f"arrivals {self.seed}"), 0.0, []
        for _ in conversations:
            times.append(now)
            now += rng.expovariate(self.rate)
        return times


@dataclass(frozen=True, slots=True)
class Measured:
    """A load's requests, in the order in which they ended."""

    samples: tuple[Sample, ...]
    seconds: float
    client_cpu_s: float
    """CPU time of this process meanwhile: what the load generator took from a server on the same machine."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the requests go."""

    url: str
    model: str = ""
    """Empty takes the first that the server names."""
    key: str = ""
    extra: tuple[tuple[str, Any], ...] = ()
    """Further fields of each body."""

    async def resolve(self) -> str:
        """The model's name. Raises ConnectionError when the server does not say."""
        if self.model:
            return self.model
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with httpx.AsyncClient(timeout=30, headers=headers) as client:
                answer = await client.get(self.url.rstrip("/") + "/v1/models")
                return str(answer.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise ConnectionError(f"{self.url} names no model: {type(error).__name__}: {error}") from None


async def run(endpoint: Endpoint, conversations: Sequence[Conversation], load: Load) -> Measured:
    """Asks everything and waits for all answers. Raises ConnectionError when there is no server to ask."""
    arrivals = load.arrivals(conversations)
    model = await endpoint.resolve()
    client = Client(endpoint.url, load.timeout_s)
    if endpoint.key:
        client.authorize(endpoint.key)
    common = {
        "model": model, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **dict(endpoint.extra),
    }  # fmt: skip
    samples: list[Sample] = []
    slots = asyncio.Semaphore(load.concurrency or len(conversations) or 1)
    started, cpu = time.perf_counter(), time.process_time()

    async def ask(conversation: Conversation) -> None:
        try:
            await _converse(client, common, conversation, samples)
        finally:
            slots.release()

    async with asyncio.TaskGroup() as tasks:
        for at, conversation in zip(arrivals, conversations, strict=True):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            await slots.acquire()
            tasks.create_task(ask(conversation))
    seconds = time.perf_counter() - started
    client.close()
    return Measured(tuple(samples), seconds, time.process_time() - cpu)


async def _converse(client: Client, common: dict[str, Any], conversation: Conversation, samples: list[Sample]) -> None:
    """All turns of one conversation; it ends with the first turn that fails."""
    messages: list[dict[str, str]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        limits = {"max_tokens": turn.max_tokens, "min_tokens": turn.max_tokens}
        if isinstance(turn.prompt, str):
            messages.append({"role": "user", "content": turn.prompt})
            sample = await client.stream("/v1/chat/completions", {**common, **limits, "messages": messages})
            messages.append({"role": "assistant", "content": sample.text})
        else:
            sample = await client.stream("/v1/completions", {**common, **limits, "prompt": turn.prompt})
        samples.append(sample)
        if sample.error:
            return
