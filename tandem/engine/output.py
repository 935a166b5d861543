"""What a step and an engine report to the worker around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tandem.cluster import StepTiming
from tandem.engine.sequence import Seq
from tandem.types import FinishReason, TokenIds, TokenLogprob


@dataclass(frozen=True, slots=True)
class SeqOutput:
    """What one step gave one sequence."""

    seq: Seq
    first_index: int
    """Index of the first token among its output tokens."""
    tokens: TokenIds
    logprobs: tuple[TokenLogprob, ...]
    """One for each token when asked for, else empty."""
    finish: FinishReason | None
    """Set with its last token, or ERROR when there was nothing to sample from. It then holds nothing any more."""
    stop_token: int | None
    forced: int = 0
    """Of the tokens, those that a grammar put there without asking the model."""
    accepted: tuple[int, ...] = ()
    """The nodes of the row's draft that are tokens now: a path from its root."""


class DraftOutcome(NamedTuple):
    """What became of one draft that was verified."""

    drafter: str
    drafted: int
    """Tokens of it."""
    accepted: int
    """Of them, those that are real tokens now; the step gave one more."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sequence's prompt is computed, cached tokens included: `[0, computed)` can be exported."""

    seq: Seq
    computed: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One step. What changed, and how long each part took."""

    outputs: tuple[SeqOutput, ...]
    progress: tuple[Progress, ...]
    """Of every sequence whose prompt went on, and of prefill-only ones that had all of it cached."""
    retracted: tuple[Seq, ...]
    batch_tokens: int
    schedule_s: float
    forward_s: float
    """Forward and sampling."""
    commit_s: float
    drafts: tuple[DraftOutcome, ...] = ()
    began: float = 0.0
    """When it had the device to itself, and when it was committed: seconds of the engine's clock."""
    ended: float = 0.0

    @property
    def advanced(self) -> bool:
        """Whether the next step can do something without a command in between."""
        return bool(self.batch_tokens or self.progress or self.retracted)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Load and cache of an engine now."""

    running: int
    waiting: int
    """In the queue, or waiting for KV."""
    held: int
    queued_tokens: int
    """Prompt tokens still to be computed here."""
    free_pages: int
    """Free or evictable; where layer groups have pools of their own, of the scarcest, as a part of `total_pages`."""
    total_pages: int
    """Of the group that remembers most."""
    cached_pages: int
    """Of the same group."""
    matched_tokens: int
    """Prompt tokens found in the cache at first admission, since the start."""
    prompt_tokens: int
    """Prompt tokens admitted since the start."""
    retractions: int
    checked_pages: int = 0
    """Cached pages whose digest was compared, since the start."""
    corrupt_pages: int = 0
    """Those of them that had changed."""
    oldest_s: float = 0.0
    """How long the sequence that waits longest has; 0 when none waits."""
    timing: StepTiming | None = None
    """Of steps, once enough were run."""
