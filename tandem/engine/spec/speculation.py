"""Speculation in an engine: which rows of a step get drafts, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.memory import KvMemory
from tandem.engine.output import SeqOutput
from tandem.engine.scheduler import Plan
from tandem.engine.sequence import NO_DRAFT, Draft, Row, Seq
from tandem.engine.spec.base import MOST_NODES, Drafter


@dataclass(slots=True)
class DraftCount:
    """What a drafter was worth, since the start."""

    steps: int = 0
    """Drafts that were verified."""
    drafted: int = 0
    """Tokens in them."""
    accepted: int = 0
    """Tokens of them that were accepted."""


class Speculation:
    """Drafts for the rows of a plan. Nothing else gives way to them: they get what a step has left."""

    def __init__(self, drafter: Drafter, memory: KvMemory, most: int) -> None:
        """most: tokens of a draft."""
        if not 1 <= most <= MOST_NODES:
            raise ValueError(f"a draft has at most {most} tokens; it must be 1 to {MOST_NODES}")
        self.count = DraftCount()
        self._drafter = drafter
        self._memory = memory
        self._most = most

    def draft(self, plan: Plan) -> None:
        """Gives rows of a scheduled plan their drafts. Pages for them come from what is free or only cached."""
        rows, limits = list[Row](), list[int]()
        budget = plan.budget
        for row in [*plan.decodes, *plan.prefills]:
            limit = min(self._limit(row), budget)
            if limit > 0 and self._memory.grow(row.seq, len(row.seq.tokens) + limit):
                rows.append(row)
                limits.append(limit)
                budget -= limit
        if not rows:
            return
        drafts = self._drafter.propose([row.seq for row in rows], limits)
        for row, limit, draft in zip(rows, limits, drafts, strict=True):
            usable = self._usable(row.seq, draft, limit)
            if len(usable):
                plan.draft(row, usable)
            else:
                self._memory.trim(row.seq)

    def _limit(self, row: Row) -> int:
        """Most tokens of a row's draft: the one sampled behind them is one of `max_tokens`, too."""
        seq = row.seq
        if not row.samples or (row.own > 1 and seq.output_len == 0):
            return 0
        if seq.sampling.prompt_logprobs is not None and len(seq.prompt_logprobs) < seq.prompt_len:
            return 0
        return min(self._most, seq.sampling.max_tokens - seq.output_len - 1)

    def _usable(self, seq: Seq, draft: Draft, limit: int) -> Draft:
        if len(draft) > limit:
            raise ValueError(f"{self._drafter.name} drafted {len(draft)} tokens for {seq.seq_id}; {limit} are allowed")
        if seq.constraint is not None and len(draft):
            return seq.constraint.prune(draft)
        return draft

    def committed(self, row: Row, output: SeqOutput | None) -> None:
        """Takes in what became of a row: straightens an accepted path, and gives back pages that it did not need."""
        accepted: Sequence[int] = () if output is None else output.accepted
        if row.draft is not NO_DRAFT:
            self._memory.straighten(row.seq, accepted, row.start + row.own)
            self._memory.trim(row.seq)
            self.count.steps += 1
            self.count.drafted += len(row.draft)
            self.count.accepted += len(accepted)
        self._drafter.committed(row, accepted)
