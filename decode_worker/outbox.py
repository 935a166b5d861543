"""Tokens on their way to one router: one message per engine step, merged while the router reads slowly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from decode_worker.requests import Choice
from tandem.types import Delta, FinishReason

MESSAGE_SCORES = 1 << 16
"""Prompt tokens' log-probabilities after which a message is full: prompts scored together would exceed its size."""


@dataclass(frozen=True, slots=True)
class ResumeAt:
    """Where a reconnecting router wants a choice to go on."""

    request_id: str
    attempt: int
    choice: int
    next_index: int


class Outbox:
    """Names the choices with something to send. What to send is read from them, so a slow router costs no memory.

    One reader at a time: a new one ends the former. `idle_since` is when the last reader left: the lease begins there.
    """

    def __init__(self, router_id: str, heartbeat_s: float) -> None:
        self.router_id = router_id
        self.idle_since: float | None = asyncio.get_running_loop().time()
        self._heartbeat_s = heartbeat_s
        self._dirty: dict[Choice, None] = {}
        self._lost: list[Delta] = []
        self._wake = asyncio.Event()
        self._reader = 0

    def mark(self, choice: Choice) -> None:
        """The choice has something new; `flush` makes it known."""
        self._dirty[choice] = None

    def lost(self, point: ResumeAt) -> None:
        """The router asks for a request that this worker does not know: it is told that the request is gone."""
        self._lost.append(
            Delta(
                point.request_id,
                point.attempt,
                point.choice,
                point.next_index,
                finish=FinishReason.ERROR,
                error="the worker no longer knows this request",
            )
        )

    @property
    def unsent(self) -> bool:
        """Whether there is something for a reader that is there."""
        return self.idle_since is None and bool(self._dirty or self._lost)

    def flush(self) -> None:
        """Wakes the reader if there is anything to send; called once a step."""
        if self._dirty:
            self._wake.set()

    def forget(self, choice: Choice) -> None:
        """The choice will never be sent again."""
        self._dirty.pop(choice, None)

    def attach(self) -> int:
        """Makes a new reader the only one, at once: nothing rewound for it may go to the former. Returns its number."""
        self._reader += 1
        self._wake.set()
        self.idle_since = None
        return self._reader

    def detach(self, reader: int) -> None:
        """The reader is gone; the lease begins unless another one took over."""
        if reader == self._reader:
            self.idle_since = asyncio.get_running_loop().time()

    async def messages(self, reader: int) -> AsyncIterator[list[Delta]]:
        """The reader's stream: lists of deltas, an empty one as heartbeat. Ends when another reader takes over."""
        while reader == self._reader:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._wake.wait()
            except TimeoutError:
                yield []
                continue
            if reader != self._reader:
                return
            self._wake.clear()
            deltas = self._take()
            if deltas:
                yield deltas

    def _take(self) -> list[Delta]:
        deltas, self._lost = self._lost, []
        scores = 0
        for choice in list(self._dirty):
            if scores >= MESSAGE_SCORES:
                self._wake.set()
                break
            del self._dirty[choice]
            if choice.closed:
                continue
            delta = choice.delta()
            # A choice that was rewound to where it stands has nothing new.
            if delta.tokens or delta.finish or delta.prompt_logprobs:
                deltas.append(delta)
                scores += len(delta.prompt_logprobs)
                choice.mark_sent()
        return deltas
