"""One admitted request on the router: what has arrived of each choice, and the bounded queue to its reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from router.backend import Reader
from router.explain.ladder import Rungs
from router.explain.story import Story
from router.workers.load import Booking
from tandem.cluster import Incarnation
from tandem.kv import BLOCK_TOKENS, BlockHash
from tandem.types import Delta, FinishReason, GenerateRequest, TokenIds


@dataclass(frozen=True, slots=True)
class Chain:
    """How the cluster names a prompt: the root of its hash chain, and the hashes of its whole blocks."""

    root: bytes
    hashes: tuple[BlockHash, ...]


@dataclass(slots=True)
class _Choice:
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def next_index(self) -> int:
        return len(self.tokens)


class OpenRequest:
    """What has come of each choice; its one reader is told at once, or of all there is when it begins to follow.

    max_buffered: scored tokens of each choice that may wait for the reader; one message may bring many of every choice:
    a worker merges what it made while this process had no time to read. Others wait at no cost, among the tokens that
    are kept of each choice anyway: whoever asked for many prompts at once reads none before the last one is taken.
    """

    def __init__(
        self, request: GenerateRequest, max_buffered: int, chain: Chain, story: Story, clock: Callable[[], float]
    ) -> None:
        self.chain = chain
        self.story = story
        """What is remembered of it once it has ended."""
        self.rungs: Rungs | None = None
        """How much of its prompt could have been cached; None until it was planned."""
        self.request = request
        """The current attempt; deltas of older ones are fenced."""
        self.decode: Incarnation | None = None
        """The decode worker asked to take it."""
        self.answered = False
        """Whether that worker has taken it."""
        self.taken = False
        """Whether any worker ever has: what it made may have been read."""
        self.losses = 0
        """Workers that were lost while they ran it, or were taking it."""
        self.moves = 0
        """Times that it was to go on elsewhere."""
        self.left = False
        """Whether that worker gave it up before it had answered."""
        self.gapped = False
        """Whether tokens came that had lost those before them."""
        self.resumed = True
        """Whether the worker's stream, as it stands, knows where to go on; False while it is opened anew for that."""
        self.decode_booking: Booking | None = None
        self.prefill_booking: Booking | None = None
        self._clock = clock
        self._max_buffered = max_buffered * request.choices
        self._choices = [_Choice() for _ in range(request.choices)]
        self._buffer: deque[Delta] = deque()
        self._buffered = 0
        self._waiting: dict[int, int] = {}
        """By choice: from where on its tokens wait for the reader, behind what is buffered."""
        self._reader: Reader | None = None
        self._done: asyncio.Future[None] | None = None
        """What the reader's `follow` waits for."""

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finished for choice in self._choices)

    def behind_blocks(self) -> list[TokenIds]:
        """What each choice has KV of behind the prompt's whole blocks; the token that was sampled last has none."""
        rest = self.request.prompt[len(self.chain.hashes) * BLOCK_TOKENS :]
        return [(*rest, *choice.tokens)[:-1] for choice in self._choices]

    def resume_points(self) -> list[tuple[int, int]]:
        """(choice, next output index) of every choice that has not ended."""
        return [(i, choice.next_index) for i, choice in enumerate(self._choices) if not choice.finished]

    def next_attempt(self) -> None:
        """Another worker is to take it: from the start, or, once something may have been read, from where it stands."""
        self.decode, self.answered, self.left = None, False, False
        self.gapped, self.resumed = False, True
        self.story.left(self._clock())
        if self.taken:
            made = tuple(tuple(choice.tokens) for choice in self._choices)
            ended = tuple(number for number, choice in enumerate(self._choices) if choice.finished)
            self.request = self.request.again(made, ended)
            return
        self.request = self.request.again()
        self._choices = [_Choice() for _ in self._choices]
        self._buffer.clear()
        self._waiting.clear()
        self._buffered = 0

    async def follow(self, reader: Reader) -> None:
        """See `router.backend.Accepted`."""
        for number in list(self._waiting):
            self._gather(number)
        while self._buffer:
            delta = self._buffer.popleft()
            self._buffered -= _weight(delta)
            reader.delta(delta)
        if self.finished:
            return
        self._done = asyncio.get_running_loop().create_future()
        self._reader = reader
        try:
            await self._done
        finally:
            self._reader = None

    def push_tokens(self, attempt: int, choice: int, first_index: int, tokens: Sequence[int]) -> str:
        """As `push`, for tokens of which nothing else is told."""
        request, reader = self.request, self._reader
        if reader is not None and attempt == request.attempt and 0 <= choice < len(self._choices):
            state = self._choices[choice]
            follows = tokens and first_index == len(state.tokens)
            if follows and not state.finished and self.story.first_token_s is not None:
                state.tokens += tokens
                try:
                    reader.tokens(choice, first_index, tokens)
                except Exception as error:  # noqa: BLE001 - it is the reader's, who hears of it
                    self._failed(error)
                return ""
        return self.push(Delta(request.request_id, attempt, choice, first_index, tuple(tokens)))

    def push(self, delta: Delta) -> str:
        """Takes what is new of a delta. Returns why the request cannot go on, or an empty string."""
        if delta.attempt != self.request.attempt or not 0 <= delta.choice < len(self._choices):
            return ""
        choice = self._choices[delta.choice]
        if choice.finished:
            return ""
        if delta.first_index > choice.next_index and not (self.answered and self.resumed):
            # The stream broke before the worker's answer came; after the answer, all is asked for again.
            self.gapped = True
            return ""
        if delta.first_index > choice.next_index:
            return f"tokens {choice.next_index} to {delta.first_index - 1} were lost on the way"
        delta = _without_first(delta, choice.next_index - delta.first_index)
        if not (delta.tokens or delta.finish or delta.prompt_logprobs):
            return ""
        weight = _weight(delta)
        if weight and self._buffered and self._buffered + weight > self._max_buffered:
            return f"the client reads too slowly: more than {self._max_buffered} tokens wait for it"
        choice.tokens += delta.tokens
        choice.finished = delta.finish is not None
        self._tell(delta)
        self._put(delta)
        return ""

    def _tell(self, delta: Delta) -> None:
        story = self.story
        if story.first_token_s is None and delta.tokens:
            story.first_token_s = self._clock()
        if delta.usage is not None:
            story.usage[delta.choice] = delta.usage
        if delta.finish is not None:
            story.finish[delta.choice] = delta.finish
            story.error = story.error or delta.error

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Ends every choice that has not ended."""
        for number, choice in enumerate(self._choices):
            if not choice.finished:
                choice.finished = True
                request = self.request
                last = Delta(request.request_id, request.attempt, number, choice.next_index, finish=reason, error=error)
                self._tell(last)
                self._put(last)

    def _put(self, delta: Delta) -> None:
        if self._reader is None or self._done is None:
            if not (weight := _weight(delta)):
                self._waiting.setdefault(delta.choice, delta.first_index)
                return
            self._gather(delta.choice, delta.first_index)
            self._buffer.append(delta)
            self._buffered += weight
            return
        try:
            self._reader.delta(delta)
        except Exception as error:  # noqa: BLE001 - it is the reader's, who hears of it
            self._failed(error)
        if self.finished and not self._done.done():
            self._done.set_result(None)

    def _gather(self, number: int, end: int | None = None) -> None:
        """Buffers a choice's waiting tokens, up to index `end`, as one delta."""
        start = self._waiting.pop(number, None)
        if start is not None:
            tokens = tuple(self._choices[number].tokens[start:end])
            self._buffer.append(Delta(self.request.request_id, self.request.attempt, number, start, tokens))

    def _failed(self, error: Exception) -> None:
        """The reader cannot go on."""
        self._reader = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _weight(delta: Delta) -> int:
    """What it counts in the buffer; nothing where it tells of tokens alone."""
    more = delta.logprobs or delta.prompt_logprobs or delta.usage or delta.finish
    return (len(delta.logprobs) or 1) if more else 0


def _without_first(delta: Delta, repeated: int) -> Delta:
    """The delta less its first `repeated` tokens, which came before."""
    if not repeated:
        return delta
    repeated = min(repeated, len(delta.tokens))
    return replace(
        delta,
        first_index=delta.first_index + repeated,
        tokens=delta.tokens[repeated:],
        logprobs=delta.logprobs[repeated:],
        prompt_logprobs=(),
    )
