"""One sequence inside the engine, and the batch of one step. These never leave the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from tandem.types import FinishReason, SamplingParams, TokenIds, TokenLogprob

ROOT = -1
"""Stands for the last real token, where a draft's node is named."""


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
    ends: frozenset[int]
    """Tokens that may follow a complete text, and end it."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and was ended by a stop token."""

    def fill(self, mask: Any, row: int) -> None:
        """Sets the bits of the tokens that may come next in `mask[row]`: int32 words, 32 tokens each."""

    def accept(self, token: int) -> None:
        """Takes the next token. Raises ValueError when the grammar does not allow it."""

    def force(self, limit: int) -> list[int]:
        """At most `limit` tokens of the text that must come next whatever the model says; they are accepted."""

    def prune(self, draft: Draft) -> Draft:
        """The draft without the nodes that this does not allow, and without what follows them."""

    def fill_draft(self, draft: Draft, mask: Any, row: int) -> None:
        """`fill` behind every node of a pruned draft, into the rows from `row` on."""


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
    tenant: str = ""
    """Whose it is; tenants of the same priority take turns."""
    cost: int = 0
    """Tokens that its tenant's share is charged with; 0 takes what is to be computed of it."""
    charged: bool = False
    """Whether its tenant has paid for it."""
    arrival: float = 0.0
    """Seconds, monotonic: ages the queue."""
    waiting_since: float = 0.0
    """Seconds, monotonic: its arrival, or when it was last retracted."""
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
    flying: Row | None = None
    """Its row in the last step that was launched and is not committed; `tokens` and `computed` do not know of it."""
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
    def request_id(self) -> str:
        """Of the request, or the ticket, that it is computed for."""
        return self.seq_id.partition(".")[0]

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

    @property
    def reached(self) -> int:
        """Tokens computed once the step in flight is done."""
        return self.computed if self.flying is None else self.flying.start + self.flying.own

    @property
    def future(self) -> int:
        """1 where the step in flight samples a token for it, and another will be wanted after that; else 0."""
        flying = self.flying
        return int(flying is not None and flying.samples and self.output_len + 1 < self.sampling.max_tokens)

    @property
    def due(self) -> int:
        """Tokens that the next step can compute, known or sampled by the step in flight: `pending` when none is."""
        if self.flying is None:
            return len(self.tokens) - self.computed
        return len(self.tokens) + self.future - self.reached

    def check(self, page_size: int) -> None:
        """Raises AssertionError when an invariant does not hold."""
        assert 0 <= self.computed <= len(self.tokens), (self.seq_id, self.computed, len(self.tokens))
        assert self.pages or self.computed == self.shared_pages == 0, (self.seq_id, self.computed)
        for pages in self.pages:
            assert len(pages) * page_size >= self.computed, (self.seq_id, len(pages), self.computed)
            assert self.shared_pages <= len(pages)


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence's own: a chain, or a tree of alternatives (Miao et al. 2024, arXiv:2305.09781).

    A token of it is called a node, by its index. Parents come before their children, and two children of one node
    differ. Raises ValueError otherwise.
    """

    tokens: TokenIds = ()
    parents: tuple[int, ...] | None = None
    """Of each node, the node before it, or `ROOT`. None: a chain, in which each token follows the one before it."""
    kind: int = 0
    """Drafts of one kind are about equally good: how often their tokens are accepted is counted together."""

    def __post_init__(self) -> None:
        parents = self.parents
        if parents is None:
            return
        if len(parents) != len(self.tokens) or any(not ROOT <= parent < node for node, parent in enumerate(parents)):
            raise ValueError(f"parents of {len(self.tokens)} drafted tokens must stand before them; got {parents}")
        if len({*zip(parents, self.tokens, strict=True)}) != len(parents):
            raise ValueError("two drafted tokens are the same after the same node")

    def __len__(self) -> int:
        return len(self.tokens)

    def parent(self, node: int) -> int:
        """The node before `node`, or `ROOT`."""
        return node - 1 if self.parents is None else self.parents[node]

    def child(self, node: int, token: int) -> int | None:
        """The node after `node` (perhaps `ROOT`) whose token is `token`."""
        return next((after for after in self.children(node) if self.tokens[after] == token), None)

    def children(self, node: int) -> list[int]:
        """The nodes after `node`, perhaps `ROOT`."""
        if self.parents is None:
            return [node + 1] if node + 1 < len(self.tokens) else []
        return [after for after, parent in enumerate(self.parents) if parent == node]

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root's child to `node`, both included; none for `ROOT`."""
        if self.parents is None:
            return tuple(range(node + 1))
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def ahead(self, node: int) -> TokenIds:
        """The tokens on the path to `node`."""
        if self.parents is None:
            return self.tokens[: node + 1]
        return tuple(self.tokens[each] for each in self.path(node))

    def depths(self) -> list[int]:
        """Of each node, how many tokens behind the last real one it stands: 1 for a child of the root."""
        if self.parents is None:
            return list(range(1, len(self.tokens) + 1))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def lineage(self) -> list[int]:
        """Of each node, those on the path to it, itself among them: bit n is node n."""
        seen: list[int] = []
        for node in range(len(self.tokens)):
            parent = self.parent(node)
            seen.append(1 << node | (0 if parent == ROOT else seen[parent]))
        return seen

    def keep(self, nodes: Sequence[int]) -> Draft:
        """The draft without all other nodes. nodes: in order, each with its parent."""
        if self.parents is None:
            return Draft(self.tokens[: len(nodes)], None, self.kind)
        places = {ROOT: ROOT, **{node: place for place, node in enumerate(nodes)}}
        parents = tuple(places[self.parents[node]] for node in nodes)
        return Draft(tuple(self.tokens[node] for node in nodes), parents, self.kind)

    def as_chain(self) -> Draft:
        """The same draft, as a chain where each node follows the one before it."""
        if self.parents is None or self.parents != tuple(range(-1, len(self.tokens) - 1)):
            return self
        return Draft(self.tokens, None, self.kind)


NO_DRAFT = Draft()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step: positions `[start, start + count)` are computed.

    The last `len(draft)` of them are the draft's. A node's KV lies in the slot of its index, behind the sequence's own
    tokens; its position, which rotations see, is that of its depth.
    """

    seq: Seq
    start: int
    count: int
    samples: bool
    """Whether the logits behind the last own token, and those behind every drafted one, yield tokens."""
    draft: Draft = NO_DRAFT
    future: bool = False
    """Whether its one token is that which the step in flight samples for the sequence."""

    @property
    def own(self) -> int:
        """Tokens of the sequence itself among those that are computed."""
        return self.count - len(self.draft.tokens)

    @property
    def place(self) -> int:
        """Where the token behind its own tokens will stand in the output of its sequence."""
        return self.start + self.own - self.seq.prompt_len


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: rows of one token first, then those with drafts, then prefill chunks."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.count for row in self.rows)


Picked = tuple[int | None, TokenLogprob | None]
"""A token and its log-probability where that was asked for; no token where the model gave no numbers."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the runner returns for one row: the sampled token, and log-probabilities where asked."""

    token: int | None
    """Behind the last own token. None when the row does not sample, or when its logits were not finite."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For prompt positions `start + 1 .. start + count` (those that exist), when the request asked for them."""
    nodes: tuple[Picked, ...] = ()
    """Behind each node of the row's draft: what would be sampled there if the draft's tokens up to it were real."""
