"""Who goes first, who gives way, and how much memory stays spare: pure functions, apart from all state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.cluster import StepTiming
from tandem.engine.sequence import Seq, SeqState

SPARE_TOKENS = 16
"""Tokens each generating sequence can go on before an admission may make it run out of pages."""

LEAST_CHUNK = 16
"""Prompt tokens that a step computes whatever the time between tokens."""

STARVED_AGES = 15
"""A sequence is starved after so many times `ageing_s`."""
PASSES = 7
"""Admissions after which a starved sequence goes before higher priorities: they keep most of the worker."""

QueueKey = tuple[int, bool, float, int]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. At most `max_batch_tokens` sequences run, since each takes a token of the budget."""

    max_batch_tokens: int = 512
    """Tokens computed in one step; a longer prompt is computed in chunks."""
    max_running: int = 64
    """Sequences in one step."""
    ageing_s: float = 2.0
    """Seconds after which a waiting sequence goes before all younger ones, whatever they have cached."""
    prefix_cache: bool = True
    """Whether KV outlives its sequence."""
    draft_tokens: int = 8
    """Tokens of a draft at most, where there is a drafter."""
    draft_adaptive: bool = True
    """Whether drafts are only as long as was measured to pay, down to none."""
    inter_token_ms: float = 0.0
    """Milliseconds that a step may take while sequences generate: prompts are then computed in smaller chunks. 0: as
    long as `max_batch_tokens` take."""

    tenant_share: float = 1.0
    """Of the cache, beyond which a tenant's own pages are evicted first."""
    verify_share: float = 0.0
    """Of the cached pages, how many are digested and looked at again when they are hit."""
    overlap: bool = False
    """Whether a step is launched before the one in front of it is committed."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the setting and the limit."""
        for name in ("max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.inter_token_ms >= 0:
            raise ValueError(f"inter_token_ms is {self.inter_token_ms}; it must be at least 0")
        if not self.ageing_s >= 0:
            raise ValueError(f"ageing_s is {self.ageing_s}; it must be at least 0")

    @property
    def running_limit(self) -> int:
        """Sequences that can run at once."""
        return min(self.max_running, self.max_batch_tokens)


def prefill_budget(budget: int, generating: int, timing: StepTiming | None, inter_token_ms: float) -> int:
    """Prompt tokens of a step in which `generating` sequences take a token each: what the bound leaves of `budget`.

    Never fewer than `LEAST_CHUNK`: prompts must go on, however slow the machine is. timing: None bounds nothing.
    """
    if generating == 0 or timing is None or inter_token_ms == 0 or timing.per_token_ms <= 0:
        return budget
    fits = int((inter_token_ms - timing.base_ms) / timing.per_token_ms) - generating
    return min(budget, max(fits, LEAST_CHUNK))


def is_aged(seq: Seq, now: float, ageing_s: float) -> bool:
    """Whether a sequence has waited long enough to go by arrival alone."""
    return now - seq.arrival >= ageing_s


def is_starved(seq: Seq, now: float, ageing_s: float) -> bool:
    """Whether a sequence has waited so long that higher priorities let it pass now and then."""
    return now - seq.arrival >= STARVED_AGES * ageing_s


def next_ageing(seq: Seq, now: float, ageing_s: float) -> float:
    """When a waiting sequence's place in the queue changes next by time alone; infinity if never."""
    later = (at for at in (seq.arrival + ageing_s, seq.arrival + STARVED_AGES * ageing_s) if at > now)
    return min(later, default=math.inf)


def queue_key(seq: Seq, ready_tokens: int, now: float, ageing_s: float) -> QueueKey:
    """Sorts the queue: priority, then the aged by arrival, then the longest ready prefix (as in SGLang).

    ready_tokens: computed or cached. Without ageing, a request with a cold prompt could wait for ever behind warm ones.
    """
    aged = is_aged(seq, now, ageing_s)
    return (-seq.priority, not aged, seq.arrival if aged else -float(ready_tokens), seq.order)


def pick_victim(holders: Iterable[Seq], requester: Seq) -> Seq | None:
    """Whose pages `requester`, a running sequence, takes: the youngest holder's, perhaps its own.

    Only running and waiting sequences give way. A waiting one that is older gives way when nobody else can: it holds
    pages and makes no progress, and the oldest running sequence must always make some. None: the requester must pause.
    """
    able = [seq for seq in holders if seq.state in (SeqState.RUNNING, SeqState.WAITING) and seq is not requester]
    youngest = max((seq for seq in able if seq.order > requester.order), key=lambda seq: seq.order, default=None)
    if youngest is not None:
        return youngest
    if any(seq.state is SeqState.RUNNING for seq in able):
        return requester
    return max(able, key=lambda seq: seq.order, default=None)


def pick_giver(holders: Iterable[Seq], stuck: Seq) -> Seq | None:
    """Who gives way when nothing runs and `stuck`, the first in the queue, lacks pages: the youngest waiting holder.

    If there is none, the youngest held one that is younger than `stuck`: its receiver may lack the pages that wait for
    `stuck`. Only the younger give way, so that two never take each other's pages in turn.
    """
    able = [seq for seq in holders if seq is not stuck]
    waiting = [seq for seq in able if seq.state is SeqState.WAITING]
    younger = [seq for seq in able if seq.state is SeqState.HELD and seq.order > stuck.order]
    return max(waiting or younger, key=lambda seq: seq.order, default=None)


def spare_pages(running: Iterable[Seq], page_size: int, window: int | None = None) -> int:
    """Pages of a layer group an admission has to leave, so that those who generate are not retracted at once.

    window: of the group; who has more tokens than that gives up a page for each that it takes.
    """
    growing = (seq for seq in running if not seq.prefill_only and (window is None or len(seq.tokens) < window))
    return sum(1 for _ in growing) * -(-SPARE_TOKENS // page_size)
