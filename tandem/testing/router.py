"""A dispatcher that answers from a script, for tests of the HTTP side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from tandem.cluster import Candidate, Plan, new_id
from tandem.errors import TandemError
from tandem.types import Delta, FinishReason, GenerateRequest, ModelInfo, TokenLogprob, Usage

Script = Callable[[GenerateRequest, int], Sequence[int]]
"""(request, choice) -> the tokens that the model would sample."""


class Deltas(AsyncIterator[Delta]):
    """A reader whose deltas are taken one after the other, with `async for` or `anext`."""

    def __init__(self, follow: Callable[[Deltas], Awaitable[None]]) -> None:
        """follow: of an accepted request."""
        self._queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._follow(follow))

    async def _follow(self, follow: Callable[[Deltas], Awaitable[None]]) -> None:
        try:
            await follow(self)
        finally:
            self._queue.put_nowait(None)

    def tokens(self, choice: int, first_index: int, tokens: Sequence[int]) -> None:
        """See `router.backend.Reader`."""
        self.delta(Delta("", 0, choice, first_index, tuple(tokens)))

    def delta(self, delta: Delta) -> None:
        """See `router.backend.Reader`."""
        self._queue.put_nowait(delta)

    async def __anext__(self) -> Delta:
        found = await self._queue.get()
        if found is None:
            self._queue.put_nowait(None)
            await self._task
            raise StopAsyncIteration
        return found


@dataclass(frozen=True, slots=True)
class FakeReply:
    """See `router.backend.Reply`."""

    cached_tokens: int
    prefill: str | None = None


class FakeAccepted:
    """Plays one request's tokens, one delta a token, choices in turn."""

    def __init__(self, owner: FakeDispatcher, request: GenerateRequest, tokens: list[list[int]]) -> None:
        self._owner = owner
        self._request = request
        self._tokens = tokens
        self.cancelled = asyncio.Event()
        self.closed = False
        self.plan = Plan((Candidate(new_id(), None, 0, 0, {}),), "fake")
        self.reply = FakeReply(owner.cached_tokens)

    async def follow(self, reader: Any) -> None:
        """See `router.backend.Accepted`."""
        async with aclosing(self._play()) as deltas:
            async for delta in deltas:
                if delta == Delta(delta.request_id, delta.attempt, delta.choice, delta.first_index, delta.tokens):
                    reader.tokens(delta.choice, delta.first_index, delta.tokens)
                else:
                    reader.delta(delta)

    async def cancel(self) -> None:
        """See `router.backend.Accepted`."""
        self.cancelled.set()

    async def _play(self) -> AsyncGenerator[Delta]:
        try:
            for step in range(max(1, *map(len, self._tokens))):
                await self._owner.pace(step)
                if step == self._owner.drop_after:
                    return
                if step == self._owner.skip_at:
                    continue
                for choice, tokens in enumerate(self._tokens):
                    if step < len(tokens):
                        yield self._delta(choice, step)
                    elif step == 0:
                        scores = self._prompt_logprobs(choice)
                        yield replace(self._end(choice, 0, FinishReason.LENGTH), prompt_logprobs=scores)
                if self.cancelled.is_set() and self._owner.silent_cancel:
                    return
                if self.cancelled.is_set():
                    for choice, tokens in enumerate(self._tokens):
                        if step + 1 < len(tokens):
                            yield self._end(choice, step + 1, FinishReason.CANCELLED)
                    return
        finally:
            self.closed = True

    def _delta(self, choice: int, step: int) -> Delta:
        tokens, sampling = self._tokens[choice], self._request.sampling
        if self._owner.fail_after is not None and step == self._owner.fail_after:
            return self._end(choice, step, FinishReason.ERROR, "the decode worker died")
        token = tokens[step]
        stopped = token in self._owner.info.eos_token_ids and not sampling.ignore_eos
        last = step + 1 == len(tokens)
        finish = None if not last else FinishReason.STOP if stopped else FinishReason.LENGTH
        top = tuple((token + rank, -0.5 - rank) for rank in range(sampling.logprobs or 0))
        return Delta(
            self._request.request_id,
            self._request.attempt,
            choice,
            step,
            (token,),
            (TokenLogprob(token, -0.5, top),) if sampling.logprobs is not None else (),
            self._prompt_logprobs(choice) if step == 0 else (),
            finish,
            token if stopped and last else None,
            usage=self._usage(step + 1) if last else None,
        )

    def _prompt_logprobs(self, choice: int) -> tuple[TokenLogprob | None, ...]:
        """Only the first choice brings them."""
        if self._request.sampling.prompt_logprobs is None or choice:
            return ()
        return tuple(TokenLogprob(t, -1.0, ((t, -1.0),)) if i else None for i, t in enumerate(self._request.prompt))

    def _end(self, choice: int, step: int, finish: FinishReason, error: str = "") -> Delta:
        request = self._request
        return Delta(
            request.request_id, request.attempt, choice, step, finish=finish, error=error, usage=self._usage(step)
        )

    def _usage(self, completion: int) -> Usage:
        return Usage(len(self._request.prompt), completion, self._owner.cached_tokens)


class FakeDispatcher:
    """See `router.backend.Dispatcher`. Records what was submitted; `release` lets a held stream go on."""

    def __init__(self, info: ModelInfo, script: Script) -> None:
        self.info = info
        self.model: ModelInfo | None = info
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.accepted: list[FakeAccepted] = []
        self.refuse: TandemError | None = None
        self.fail_after: int | None = None
        """The worker dies before this token."""
        self.drop_after: int | None = None
        """Streams just end before this token."""
        self.silent_cancel = False
        """A cancelled stream ends without a word on usage."""
        self.skip_at: int | None = None
        """This token gets lost."""
        self.cached_tokens = 0
        self.hold_at: int | None = None
        """Streams wait before this token until `release` is set."""
        self.release = asyncio.Event()
        self.held = asyncio.Event()

    def address_of(self, incarnation: str) -> str | None:
        """See `router.backend.Dispatcher`."""
        return None

    def ready(self) -> bool:
        """See `router.backend.Dispatcher`."""
        return self.model is not None

    async def submit(self, request: GenerateRequest) -> FakeAccepted:
        """See `router.backend.Dispatcher`."""
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        limit = request.sampling.max_tokens
        tokens = [list(self.script(request, choice))[:limit] for choice in range(request.choices)]
        accepted = FakeAccepted(self, request, tokens)
        self.accepted.append(accepted)
        return accepted

    async def pace(self, step: int) -> None:
        """Called before each step of a stream."""
        await asyncio.sleep(0)
        if self.hold_at is not None and step >= self.hold_at and self.accepted:
            self.held.set()
            cancels = [asyncio.ensure_future(a.cancelled.wait()) for a in self.accepted]
            released = asyncio.ensure_future(self.release.wait())
            try:
                await asyncio.wait([released, *cancels], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for waiter in (released, *cancels):
                    waiter.cancel()
