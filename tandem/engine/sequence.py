"""One sequence inside the engine, and the batch of one step. These never leave the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from tandem.types import FinishReason, SamplingParams, TokenLogprob


class SeqState(Enum):
    """Where a sequence is. Each has exactly one state; only the scheduler and the engine change it."""

    WAITING = auto()
    """In the queue: no page held, or pages held but nothing scheduled yet."""
    WAITING_KV = auto()
    """Its prompt's KV is being handed over; not schedulable."""
    RUNNING = auto()
    """Holds pages and takes part in steps."""
    HELD = auto()
    """Prefill only: computed, its pages are referenced until they were pushed."""
    FINISHED = auto()


class TokenConstraint(Protocol):
    """A sequence's way through its grammar: which token may come next."""

    active: bool
    """Whether the output is bound now; False while a reasoning model thinks."""
    stuck: bool
    """Whether the last mask allowed nothing."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and was ended by a stop token."""

    def fill(self, mask: Any, row: int) -> None:
        """Sets the bits of the tokens that may come next in `mask[row]`: int32 words, 32 tokens each."""

    def accept(self, token: int) -> None:
        """Takes the next token. Raises ValueError when the grammar does not allow it."""

    def force(self, limit: int) -> list[int]:
        """At most `limit` tokens of the text that must come next whatever the model says; they are accepted."""


@dataclass(slots=True, eq=False)
class Seq:
    """A token sequence, what is computed of it, and the pages that hold its KV.

    Invariants (checked by `check`): `computed <= len(tokens)`; pages cover at least `computed` tokens; only the last
    token of a decoding sequence is not computed.
    """

    seq_id: str
    """Unique in this engine: request, attempt and choice."""
    tokens: list[int]
    """Prompt, then output."""
    prompt_len: int
    sampling: SamplingParams
    root: bytes
    """`HashRoot.digest()`: sequences of different roots never share cache."""
    eos_ids: frozenset[int]
    """Ids that end it (empty when they are to be ignored), extra stop ids included."""
    choice: int = 0
    """Philox counter word, so that choices of one request differ."""
    prefill_only: bool = False
    """Compute the KV of all `tokens` and stop without sampling (a prefill worker's sequence)."""
    priority: int = 0
    arrival: float = 0.0
    """Seconds, monotonic: ages the queue."""
    order: int = 0
    """Admission number: retraction takes the largest first."""

    state: SeqState = SeqState.WAITING
    computed: int = 0
    """Tokens whose KV is in `pages`."""
    pages: list[list[int]] = field(default_factory=list)
    """Page numbers per layer group, in token order; empty while it has no memory.

    Of group g, token p lies at slot `pages[g][p // page_size] * page_size + p % page_size`. Groups with a window have
    `NO_PAGE` where no position that is still to be computed sees.
    """
    slid: list[int] = field(default_factory=list)
    """Per group, pages at the start that it gave up, or never had, since its window has passed them."""
    shared_pages: int = 0
    """The first so many pages belong to the prefix cache (held through `node`), the rest to the sequence alone."""
    node: object | None = None
    """The prefix cache's handle that keeps the shared pages from being evicted."""
    cached_tokens: int = 0
    """Prompt tokens found in this worker's cache when it was first admitted."""
    retractions: int = 0
    constraint: TokenConstraint | None = None
    """What its output's text must be; None leaves it free."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def output_len(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def target(self) -> int:
        """Tokens to compute before it can sample (or, prefill only, before it is done)."""
        return len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens not yet computed: 1 for a decoding sequence, more for one in prefill."""
        return len(self.tokens) - self.computed

    def check(self, page_size: int) -> None:
        """Raises AssertionError when an invariant does not hold."""
        assert 0 <= self.computed <= len(self.tokens), (self.seq_id, self.computed, len(self.tokens))
        assert self.pages or self.computed == self.shared_pages == 0, (self.seq_id, self.computed)
        for pages in self.pages:
            assert len(pages) * page_size >= self.computed, (self.seq_id, len(pages), self.computed)
            assert self.shared_pages <= len(pages)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: positions `[start, start + count)` are computed."""

    seq: Seq
    start: int
    count: int
    samples: bool
    """Whether the last position's logits yield a token."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: rows of decoding sequences (count 1) first, then prefill chunks."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the runner returns for one row: the sampled token, and log-probabilities where asked."""

    token: int | None
    """None when the row does not sample, or when its logits were not finite."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For prompt positions `start + 1 .. start + count` (those that exist), when the request asked for them."""
