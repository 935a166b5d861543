"""Speculation in an engine: which rows of a step get drafts, how long these are, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tandem.engine.memory import KvMemory
from tandem.engine.output import DraftOutcome, SeqOutput
from tandem.engine.scheduler import Plan
from tandem.engine.sequence import NO_DRAFT, Batch, Draft, Row, Seq
from tandem.engine.spec.adaptive import FIRST_GUESS, HOPEFUL, Costs, Load, Offer, Pause, Rate, choose_lengths
from tandem.engine.spec.base import MOST_NODES, Drafter

KEPT = 0.85
"""Weight of the past in a sequence's own rate, for each of its drafts: about the last seven count."""
KEPT_OF_ALL = 0.98
"""The same in the rate of all drafts of a kind."""
PROBE_TOKENS = 2
"""Length of a draft that only asks whether drafts have become better."""
PROBE_STEPS = 8
"""Least steps from one such draft to the next, of whatever sequences."""
RENEW_STEPS = 32
"""Steps with drafts between which there is one without, to see what these save now: machines change their pace."""
IDLE_STEPS, REST = 16, 8
"""After so many steps without a draft that may pay, nothing is looked for in so many: looking costs, too."""


@dataclass(slots=True)
class _Record:
    """What is known of one sequence's drafts."""

    rates: dict[int, Rate] = field(default_factory=dict)
    pause: Pause = field(default_factory=Pause)


class Speculation:
    """Drafts for the rows of a plan. Nothing else gives way to them: they get what a step has left."""

    def __init__(self, drafter: Drafter, memory: KvMemory, most: int, adaptive: bool) -> None:
        """most: tokens of a draft. adaptive: whether drafts are only as long as pays; else as long as they can be."""
        if not 1 <= most <= MOST_NODES:
            raise ValueError(f"a draft has at most {most} tokens; it must be 1 to {MOST_NODES}")
        self.drafted = self.accepted = 0
        """Tokens, since the start."""
        self._outcomes: list[DraftOutcome] = []
        self.drafter = drafter
        self._memory = memory
        self._most = most
        self._adaptive = adaptive
        self._rates: dict[int, Rate] = {}
        self._records: dict[str, _Record] = {}
        self._plain, self._drafted = Costs(), Costs()
        self._since_probe = 0
        self._idle = self._rested = self._since_plain = 0
        self._load = Load(0, 0, 0)

    def draft(self, plan: Plan) -> None:
        """Gives rows of a scheduled plan their drafts. Pages for them come from what is free or only cached."""
        if self._rests():
            return
        offered = [(row, limit) for row in (*plan.decodes, *plan.prefills) if (limit := self._limit(row)) > 0]
        if not offered or plan.budget < 1:
            return
        batch = plan.batch
        self._load = Load(sum(row.samples for row in batch.rows), batch.num_tokens, plan.budget)
        rows, limits = [row for row, _ in offered], [limit for _, limit in offered]
        if self.drafter.free:
            drafts = self._propose(rows, limits)
            lengths = self._lengths(rows, [len(draft) for draft in drafts], [draft.kind for draft in drafts])
            self._give(plan, rows, [_cut(draft, length) for draft, length in zip(drafts, lengths, strict=True)])
            return
        lengths = self._lengths(rows, limits, [0] * len(rows))
        wanted = [
            (row, length)
            for row, length in zip(rows, lengths, strict=True)
            if length and self._memory.grow(row.seq, len(row.seq.tokens) + length)
        ]
        if wanted:
            self._give(plan, [row for row, _ in wanted], self._propose(*map(list, zip(*wanted, strict=True))))

    def _rests(self) -> bool:
        self._rested += 1
        if self._adaptive and (self._since_plain >= RENEW_STEPS or (self._idle >= IDLE_STEPS and self._rested <= REST)):
            return True
        self._rested = 0
        return False

    def _limit(self, row: Row) -> int:
        """Most tokens of a row's draft: the one sampled behind them is one of `max_tokens`, too."""
        seq = row.seq
        if not row.samples or (row.own > 1 and seq.output_len == 0):
            return 0
        if seq.sampling.prompt_logprobs is not None and len(seq.prompt_logprobs) < seq.prompt_len:
            return 0
        return min(self._most, seq.sampling.max_tokens - seq.output_len - 1)

    def _propose(self, rows: Sequence[Row], limits: Sequence[int]) -> list[Draft]:
        """Drafts of these rows, without what a grammar does not allow. Raises ValueError on one that is too long."""
        drafts = self.drafter.propose([row.seq for row in rows], limits)
        found = []
        for row, limit, draft in zip(rows, limits, drafts, strict=True):
            if len(draft) > limit:
                name = self.drafter.name
                raise ValueError(f"{name} drafted {len(draft)} tokens for {row.seq.seq_id}; {limit} are allowed")
            bound = row.seq.constraint if len(draft) else None
            found.append(draft if bound is None else bound.prune(draft))
        return found

    def _give(self, plan: Plan, rows: Sequence[Row], drafts: Sequence[Draft]) -> None:
        for row, draft in zip(rows, drafts, strict=True):
            if len(draft) and self._memory.grow(row.seq, len(row.seq.tokens) + len(draft)):
                plan.draft(row, draft)
            else:
                self._memory.trim(row.seq)

    # How long.

    def _lengths(self, rows: Sequence[Row], limits: Sequence[int], kinds: Sequence[int]) -> list[int]:
        """Draft tokens of each row, at most its limit, and in all at most what the plan's budget leaves."""
        if not self._adaptive:
            lengths, left = [], self._load.budget
            for limit in limits:
                lengths.append(min(limit, left))
                left -= lengths[-1]
            return lengths
        records = [self._records.setdefault(row.seq.seq_id, _Record()) for row in rows]
        each = zip(records, kinds, limits, strict=True)
        offers = [Offer(self._chance(record, kind), limit, self.drafter.branches) for record, kind, limit in each]
        lengths = choose_lengths(offers, self._load, self._plain, self._drafted)
        steps = 1 if self._idle < IDLE_STEPS else 1 + REST
        self._idle = 0 if any(lengths) else self._idle + 1
        self._since_probe += steps
        for at, (record, offer) in enumerate(zip(records, offers, strict=True)):
            if lengths[at] or not offer.limit or not record.pause.wait(steps) or self._since_probe < PROBE_STEPS:
                continue
            if sum(lengths) + PROBE_TOKENS <= self._load.budget and self._may_pay(offers):
                self._since_probe = 0
                record.pause.probe()
                lengths[at] = min(offer.limit, PROBE_TOKENS)
        return lengths

    def _may_pay(self, offers: Sequence[Offer]) -> bool:
        """Whether drafts would pay if nearly all their tokens were accepted."""
        hopeful = [replace(offer, chance=HOPEFUL) for offer in offers]
        # One slow step is no reason never to draft again.
        known = self._drafted.knows(self._load.tokens + PROBE_TOKENS)
        return any(choose_lengths(hopeful, self._load, self._plain, self._drafted if known else self._plain))

    def _chance(self, record: _Record, kind: int) -> float:
        guess = self._rates[kind].value(FIRST_GUESS) if kind in self._rates else FIRST_GUESS
        return record.rates[kind].value(guess) if kind in record.rates else guess

    # What became of it.

    def committed(self, row: Row, output: SeqOutput | None) -> None:
        """Takes in what became of a row: straightens an accepted path, and gives back pages that it did not need."""
        accepted: Sequence[int] = () if output is None else output.accepted
        if row.draft is not NO_DRAFT:
            self._memory.straighten(row.seq, accepted, row.start + row.own)
            self._memory.trim(row.seq)
            self._learn(row.seq, row.draft, len(accepted))
        self.drafter.committed(row, accepted)

    def _learn(self, seq: Seq, draft: Draft, accepted: int) -> None:
        self.drafted += len(draft)
        self.accepted += accepted
        self._outcomes.append(DraftOutcome(self.drafter.name, len(draft), accepted))
        tested = min(accepted + 1, max(draft.depths()))
        self._rates.setdefault(draft.kind, Rate()).add(accepted, tested, KEPT_OF_ALL)
        record = self._records.setdefault(seq.seq_id, _Record())
        record.rates.setdefault(draft.kind, Rate()).add(accepted, tested, KEPT)
        if accepted == tested:
            record.pause.end()

    def drain(self) -> tuple[DraftOutcome, ...]:
        """What became of drafts since the last call."""
        outcomes, self._outcomes = tuple(self._outcomes), []
        return outcomes

    def measured(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        if seconds <= 0.0:
            return
        if any(len(row.draft) for row in batch.rows):
            self._drafted.add(batch.num_tokens, seconds)
            self._plain.expire()
            self._since_plain += 1
        else:
            self._since_plain = 0
            self._plain.add(batch.num_tokens, seconds)
            self._drafted.expire()

    def forget(self, seq: Seq) -> None:
        """The sequence ends or loses its pages."""
        self._records.pop(seq.seq_id, None)
        self.drafter.forget(seq)


def _cut(draft: Draft, length: int) -> Draft:
    return draft if length == len(draft) else draft.keep(range(length))
