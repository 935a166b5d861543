"""What the decode worker remembers of each request: its choices, what they have produced, and what of it was sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from decode_worker.grammars import MakeConstraint
from tandem.engine.sequence import Seq
from tandem.types import Delta, FinishReason, GenerateRequest, TokenLogprob, Usage

if TYPE_CHECKING:
    from decode_worker.prefill_client import Outcome


class RequestTrace(Protocol):
    """Who is told how a traced request goes, and when, in seconds of the event loop (`decode_worker/tracing.py`)."""

    def prepared(self, now: float) -> None:
        """It was admitted, and its prompt's turn begins."""

    def hand_over(self, now: float) -> tuple[str, str]:
        """A prefill worker is asked. Returns what that worker's spans belong to: `traceparent`, `tracestate`."""

    def landed(self, now: float, outcome: Outcome, moved_tokens: int) -> None:
        """The hand-over has ended."""

    def ended(self, record: Request, now: float) -> None:
        """Every choice has ended."""


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request. The engine appends through the worker; the outbox reads from `sent` on."""

    request: Request
    index: int
    seq: Seq
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: str = ""
    resumed: int = 0
    """The first so many output tokens were made by a worker that is gone; the router has them."""
    sent: int = 0
    """Output tokens already put into a message."""
    leaving: bool = False
    """Whether it ends only because this worker does."""
    closed: bool = False
    """Whether its end was put into a message."""
    last_token_at: float = 0.0

    def delta(self) -> Delta:
        """Everything not yet sent; the caller marks it as sent with `mark_sent`."""
        first = self.sent
        return Delta(
            request_id=self.request.request.request_id,
            attempt=self.request.request.attempt,
            choice=self.index,
            first_index=first,
            tokens=tuple(self.tokens[first:]),
            logprobs=tuple(self.logprobs[first - self.resumed :]),
            prompt_logprobs=self.prompt_logprobs if first == 0 else (),
            finish=self.finish,
            stop_token=self.stop_token,
            error=self.error,
            leaving=self.leaving,
            usage=self.usage() if first == 0 or self.finish is not None else None,
        )

    def mark_sent(self) -> None:
        """All that `delta` returned is on its way."""
        self.sent = len(self.tokens)
        self.closed = self.finish is not None

    def rewind(self, next_index: int) -> None:
        """A reconnecting router asks for everything from output index `next_index` on."""
        self.sent = max(self.resumed, min(next_index, len(self.tokens)))
        self.closed = False

    def usage(self) -> Usage:
        """Token counts so far."""
        owner, prompt = self.request, len(self.request.request.prompt)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=len(self.tokens),
            cached_tokens=min(owner.cached_tokens, prompt),
            decode_cached_tokens=min(owner.decode_cached, prompt),
            moved_tokens=min(owner.moved_tokens, prompt),
            sender=owner.sender,
            hand_over_ms=owner.hand_over_ms,
        )


@dataclass(slots=True, eq=False)
class Request:
    """One admitted request. It ends exactly once: when all its choices have a `finish`."""

    request: GenerateRequest
    router_id: str
    admitted_at: float
    choices: list[Choice] = field(default_factory=list)
    decode_cached: int = 0
    sender_cached: int = 0
    """Prompt tokens that the prefill worker had cached and whose KV arrived."""
    moved_tokens: int = 0
    sender: str = ""
    """The prefill worker that was asked last."""
    hand_over_ms: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None
    spans: RequestTrace | None = None
    """Makes its trace; None where it is not traced."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV nobody had to compute."""
        return max(self.decode_cached, self.sender_cached)

    @property
    def lead(self) -> Choice:
        """The choice that gets the prompt's KV."""
        return self.choices[self.request.lead]

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self.choices)

    def open_choices(self) -> Iterator[Choice]:
        """Choices that have not ended."""
        return (choice for choice in self.choices if choice.finish is None)


def make_request(
    request: GenerateRequest,
    router_id: str,
    root: bytes,
    eos_ids: frozenset[int],
    order: int,
    now: float,
    constrain: MakeConstraint | None = None,
) -> Request:
    """The record with one sequence for each choice. Only the first one carries the prompt's log-probabilities.

    What other workers made of a choice stands in its sequence behind the prompt, as if it had been made here: places in
    the output, penalties and grammar go on from there. Choices that ended elsewhere are over at once.
    constrain: makes each choice's way through the request's grammar.
    """
    record = Request(request, router_id, admitted_at=now)
    sampling = request.sampling
    stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
    for index in range(request.choices):
        made = request.made(index)
        seq = Seq(
            seq_id=f"{request.request_id}.{request.attempt}.{index}",
            tokens=[*request.prompt, *made],
            prompt_len=len(request.prompt),
            sampling=sampling if index == 0 and not made else replace(sampling, prompt_logprobs=None),
            root=root,
            eos_ids=stops,
            choice=index,
            priority=request.priority,
            tenant=request.tenant,
            cost=request.cost // request.choices,
            arrival=now,
            order=order + index,
            constraint=constrain() if constrain is not None else None,
        )
        choice = Choice(record, index, seq, tokens=list(made), resumed=len(made), sent=len(made))
        if index in request.ended:
            choice.finish, choice.closed = FinishReason.STOP, True
        elif seq.constraint is not None:
            for token in made:
                seq.constraint.accept(token)
        record.choices.append(choice)
    return record
