"""One HTTP request at work in the cluster: submits it, follows each choice to its end, cancels what nobody needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from router.answers.stream import ChoiceStream, Piece
from router.backend import Accepted, Dispatcher
from router.explain.story import route
from router.metrics import RequestTimer
from router.requests.job import Job
from tandem.errors import WorkerLost
from tandem.text.detokenizer import CONTEXT_TOKENS
from tandem.text.prompt import PromptTokenizer
from tandem.types import Delta

MAX_ROUTES = 4
"""Prompts of one request whose route its answer's header names."""
CANCEL_GRACE_S = 1.0
"""Seconds to wait for the usage of a request whose last choice was ended here, by a stop string."""


class Give(Protocol):
    """Where an answer's pieces go."""

    def piece(self, piece: Piece) -> None:
        """The next piece of a choice."""

    def text(self, choice: int, text: str) -> None:
        """As `piece`, for one that is text and nothing else."""


@dataclass(frozen=True, slots=True)
class TotalUsage:
    """Token counts over all prompts and choices of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None
    """Those of the completion; None when reasoning is not looked for."""


class Answer:
    """The choices of one job. Made by `start`; `run` may be called once."""

    def __init__(self, job: Job, accepted: list[Accepted], text: PromptTokenizer, timer: RequestTimer) -> None:
        self.job = job
        self._accepted = accepted
        self._text = text
        self._timer = timer
        self._prompt_tokens = sum(len(request.prompt) for request in job.requests)
        self._cached = [self._cached_of(rank, []) for rank in range(len(accepted))]
        """By prompt."""
        self._tokens = self._thoughts = 0
        self._counted: dict[int, tuple[int, int]] = {}
        """By choice: its tokens and its thoughts, as far as they are in those sums."""
        self.choices: list[ChoiceStream] = []
        for request in job.requests:
            for _ in range(request.choices):
                index = len(self.choices)
                eos = job.model.eos_token_ids
                self.choices.append(
                    ChoiceStream(index, text.tokenizer, job.options, request.prompt[-CONTEXT_TOKENS:], eos)
                )

    @classmethod
    async def start(cls, job: Job, dispatcher: Dispatcher, text: PromptTokenizer, timer: RequestTimer) -> Answer:
        """Submits all requests. Raises the first refusal, after cancelling those that were taken."""
        submits = [asyncio.ensure_future(dispatcher.submit(request)) for request in job.requests]
        try:
            accepted = list(await asyncio.gather(*submits))
        except BaseException:
            await asyncio.shield(_withdraw(submits))  # to its end, also if the client goes away meanwhile
            raise
        return cls(job, accepted, text, timer)

    def route(self) -> str:
        """Where the requests went: the value of `x-tandem-route`, one element for each of the first few prompts."""
        pairs = list(zip(self._accepted, self.job.requests, strict=True))
        said = [route(a.plan, a.reply.cached_tokens, len(r.prompt), a.reply.prefill) for a, r in pairs[:MAX_ROUTES]]
        return ", ".join(said if len(pairs) == len(said) else [*said, f"and {len(pairs) - len(said)} more"])

    async def run(self, give: Give) -> None:
        """Gives pieces out until every choice has ended.

        Raises WorkerLost when a choice ended in an error; whatever ends this call early, cancellation included, ends
        the work in the cluster too.
        """
        offset = 0
        follows = []
        for rank, request in enumerate(self.job.requests):
            mine = self.choices[offset : offset + request.choices]
            follows.append(self._follow(rank, mine, give))
            offset += request.choices
        try:
            async with asyncio.TaskGroup() as group:
                for follow in follows:
                    group.create_task(follow)
        except ExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            await asyncio.gather(*(accepted.cancel() for accepted in self._accepted))

    def usage(self) -> TotalUsage:
        """Counts up to now. Cached tokens are what the worker reported at the end, and until then when it accepted.

        Tokens that are nothing but text count with what comes after them of their choice, its end at the latest: only
        answers that tell their usage all the time are asked before, and those have none.
        """
        thoughts = None if self.choices[0].reasoning_tokens is None else self._thoughts
        return TotalUsage(self._prompt_tokens, self._tokens, sum(self._cached), thoughts)

    def _count(self, rank: int, choices: list[ChoiceStream], delta: Delta) -> None:
        """Keeps `usage` up to date: there may be a thousand choices, and a chunk that tells it for every token."""
        stream = choices[delta.choice]
        tokens, thoughts = self._counted.get(stream.choice, (0, 0))
        self._counted[stream.choice] = now = (len(stream.tokens), stream.reasoning_tokens or 0)
        self._tokens += now[0] - tokens
        self._thoughts += now[1] - thoughts
        if delta.usage is not None:
            self._cached[rank] = self._cached_of(rank, [each.usage.cached_tokens for each in choices if each.usage])

    def _cached_of(self, rank: int, reported: list[int]) -> int:
        # The last prompt token is always computed: its logits choose the first output token.
        return min(*(reported or [self._accepted[rank].reply.cached_tokens]), len(self.job.requests[rank].prompt) - 1)

    async def _follow(self, rank: int, choices: list[ChoiceStream], give: Give) -> None:
        accepted, prompt = self._accepted[rank], self.job.prompts[rank]
        cancels: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(None) as grace:

                def satisfied() -> None:
                    grace.reschedule(asyncio.get_running_loop().time() + CANCEL_GRACE_S)
                    cancels.append(asyncio.ensure_future(accepted.cancel()))

                count = partial(self._count, rank, choices)
                follower = _Follower(choices, self._timer, count, give, satisfied)
                await accepted.follow(follower)
                await asyncio.gather(*cancels)
        except TimeoutError:
            if not grace.expired():
                raise
        if follower.open:
            raise WorkerLost(f"the stream ended with {follower.open} choices unfinished")
        for choice in choices:
            if (answer := choice.whole_answer()) is not None:
                await asyncio.sleep(0)  # each is decoded, and there may be many
                self._text.remember(prompt, answer, "".join(choice.text))


class _Follower:
    """Makes pieces of one request's tokens, as they come."""

    def __init__(
        self,
        choices: list[ChoiceStream],
        timer: RequestTimer,
        count: Callable[[Delta], None],
        give: Give,
        satisfied: Callable[[], None],
    ) -> None:
        """count: called for each delta. satisfied: when every choice has ended and the worker goes on with one."""
        self.open = len(choices)
        """Choices that have not ended."""
        self._choices = choices
        self._timer = timer
        self._count = count
        self._give = give
        self._satisfied = satisfied
        self._cut = False
        """Whether a choice was ended here, before the worker ended it."""

    def tokens(self, choice: int, first_index: int, tokens: Sequence[int]) -> None:
        """See `router.backend.Reader`."""
        stream = self._choices[choice]
        if not stream.plain or first_index != len(stream.tokens):
            self.delta(Delta("", 0, choice, first_index, tuple(tokens)))
        elif stream.finish is None:
            self._timer.tokens(stream.choice, len(tokens))
            if text := stream.plain_text(tokens):
                self._give.text(stream.choice, text)

    def delta(self, delta: Delta) -> None:
        """See `router.backend.Reader`. Raises WorkerLost when the choice ended in an error."""
        stream = self._choices[delta.choice]
        was_open = stream.finish is None
        piece = stream.feed(delta)
        self._count(delta)
        if delta.tokens and was_open:
            self._timer.tokens(stream.choice, len(delta.tokens))
        if piece is None:
            return
        if piece.error:
            raise WorkerLost(piece.error)
        self._give.piece(piece)
        if piece.finish is not None:
            self.open -= 1
            self._cut |= delta.finish is None
        if not self.open and self._cut:
            self._satisfied()


async def _withdraw(submits: Sequence[asyncio.Future[Accepted]]) -> None:
    """Ends submissions, and cancels what was taken all at once: a worker may take its time to answer."""
    for submit in submits:
        submit.cancel()
    results = await asyncio.gather(*submits, return_exceptions=True)
    taken = [result.cancel() for result in results if not isinstance(result, BaseException)]
    await asyncio.gather(*taken, return_exceptions=True)


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, ExceptionGroup) else found
