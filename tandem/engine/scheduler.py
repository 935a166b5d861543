"""Continuous batching: which tokens the next step computes, and whose pages make room for them."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tandem.cluster import StepTiming
from tandem.engine.fairness import fair_order, present, served
from tandem.engine.memory import KvMemory
from tandem.engine.policy import (
    PASSES,
    EngineConfig,
    QueueKey,
    is_aged,
    is_starved,
    next_ageing,
    pick_giver,
    pick_victim,
    prefill_budget,
    queue_key,
    spare_pages,
)
from tandem.engine.radix import TOKEN_BYTES, pack
from tandem.engine.sequence import Batch, Draft, Row, Seq, SeqState
from tandem.engine.twins import Twins

FAIR_STARTS = 64
"""Waiting sequences that are put in the order of their tenants' turns in one step: more than a step ever starts."""
REFRESHES = 8
"""Queued sequences whose cached prefix is looked up again in one step, once the cache has grown."""


@dataclass(slots=True, eq=False)
class Queued:
    """A waiting sequence and what was last known to be cached of it."""

    seq: Seq
    packed: bytes
    cached: int
    version: int
    """Of the cache, at the time of the lookup."""

    @property
    def ready(self) -> int:
        """Tokens that need no computing."""
        return max(self.seq.computed, self.cached)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.seq.tenant

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.seq.priority

    @property
    def cost(self) -> int:
        """Tokens that its tenant is charged with."""
        return max(self.seq.cost or len(self.seq.tokens) - self.ready, 1)


@dataclass(frozen=True, slots=True)
class Standstill:
    """Why nobody could be admitted in the last step. While it holds, sorting the queue again would change nothing."""

    changes: tuple[int, int, int]
    """Versions of the queue, of the cache and of all windows; while they are the same, no page was given back."""
    until: float
    """When a sequence's place changes by its age."""


@dataclass(slots=True)
class Plan:
    """What a step does. Filled by the scheduler, then only read."""

    budget: int
    now: float = 0.0
    """Seconds, monotonic."""
    decodes: list[Row] = field(default_factory=list)
    drafted: list[Row] = field(default_factory=list)
    """Rows that were given drafts; they are in none of the others."""
    prefills: list[Row] = field(default_factory=list)
    retracted: list[Seq] = field(default_factory=list)
    """Sequences that lost their pages and wait again."""
    cached: list[Seq] = field(default_factory=list)
    """Prefill-only sequences that had nothing left to compute."""
    ahead: bool = False
    """Whether a step is in flight: nobody's pages are taken then, since the device may write to them."""
    stalled: bool = False
    """Ahead, somebody's pages would have had to be taken: nothing is to be launched before that step is committed."""

    def add(self, seq: Seq, room: int) -> None:
        """Takes as many of a sequence's pending tokens as the budget allows, of those that its pages have room for."""
        count = min(room, self.budget)
        if count == 0:
            return
        samples, start = count == seq.due and not seq.prefill_only, seq.reached
        rows = self.decodes if count == 1 else self.prefills
        rows.append(Row(seq, start, count, samples, future=start == len(seq.tokens)))
        self.budget -= count

    def draft(self, row: Row, draft: Draft) -> None:
        """Gives a row a draft, for which its sequence's pages have room."""
        (self.decodes if row in self.decodes else self.prefills).remove(row)
        self.drafted.append(replace(row, count=row.count + len(draft), draft=draft))
        self.budget -= len(draft)

    def drop(self, seq: Seq) -> None:
        """Takes a sequence's row out again."""
        for rows in (self.decodes, self.prefills):
            for row in rows:
                if row.seq is seq:
                    rows.remove(row)
                    self.budget += row.count
                    return

    @property
    def batch(self) -> Batch:
        """The rows, single tokens first."""
        return Batch((*self.decodes, *self.drafted, *self.prefills))


class Scheduler:
    """The queue and the running set. Decoding tokens come first, then chunks of prompts, oldest first."""

    def __init__(self, memory: KvMemory, config: EngineConfig) -> None:
        self.running: list[Seq] = []
        """By admission number."""
        self.blocked: Seq | None = None
        """The aged sequence that could not have its pages in the last step: nobody younger may take them."""
        self._claim: Seq | None = None
        """The sequence that could not reserve pages for KV it waits for: the same holds for it, once it is aged."""
        self._memory = memory
        self._config = config
        self._queue: dict[str, Queued] = {}
        self._held: dict[str, Seq] = {}
        self._stale: list[Queued] = []
        self._twins = Twins(memory.page_size) if config.prefix_cache else None
        self._changes = 0
        self._standstill: Standstill | None = None
        self._balances: dict[str, float] = {}
        self._passed = 0
        """Admissions since the last one of a starved sequence."""

    @property
    def waiting(self) -> Iterator[Seq]:
        """Sequences in the queue, in no order."""
        return (item.seq for item in self._queue.values())

    def __len__(self) -> int:
        return len(self.running) + len(self._queue)

    def enqueue(self, seq: Seq) -> None:
        """Lets a sequence wait, with the pages it has."""
        self.remove(seq)
        seq.state = SeqState.WAITING
        item = Queued(seq, pack(seq.tokens), 0, -1)
        self._queue[seq.seq_id] = item
        self._look_up(item)

    def remove(self, seq: Seq) -> None:
        """Forgets a sequence; its pages are the caller's to close."""
        self.note_change()
        self._held.pop(seq.seq_id, None)
        if self._twins is not None:
            self._twins.forget(seq)
        if self._queue.pop(seq.seq_id, None) is None and seq.state is SeqState.RUNNING:
            self.running.remove(seq)
        self.blocked = None if self.blocked is seq else self.blocked
        self._claim = None if self._claim is seq else self._claim

    def note_change(self) -> None:
        """Pages were given back: who waits for some is looked at again."""
        self._changes += 1

    def hold(self, seq: Seq) -> None:
        """A prefill-only sequence is computed: it keeps its pages, but waits and runs no more."""
        self.remove(seq)
        self._memory.slide(seq)
        seq.state = SeqState.HELD
        self._held[seq.seq_id] = seq

    def pin(self, seq: Seq) -> None:
        """A held sequence is being pushed: its pages are not taken any more, since they will soon be given back."""
        self._held.pop(seq.seq_id, None)

    def open_queued(self, seq: Seq) -> None:
        """Locks the cached prefix of a queued sequence; prefill-only and complete, it leaves the queue as HELD."""
        item = self._queue[seq.seq_id]
        if self._memory.open(seq, item.packed, 0) and seq.pending == 0:
            self.hold(seq)

    def open_reserved(self, seq: Seq) -> bool:
        """Pages for all tokens of a sequence that waits for KV, unless an older one waits for pages."""
        older = any(other is not None and other.order < seq.order for other in (self.blocked, self._claim))
        if not older and self._memory.open(seq, pack(seq.tokens), len(seq.tokens), self._spare(), landing=True):
            self._claim = None if self._claim is seq else self._claim
            return True
        if self._claim is None or seq.order < self._claim.order:
            self._claim = seq
        return False

    def queued_tokens(self) -> int:
        """Tokens still to be computed before everyone here has its first token."""
        waiting = sum(len(item.seq.tokens) - item.ready for item in self._queue.values())
        return waiting + sum(seq.pending for seq in self.running)

    def schedule(self, now: float, timing: StepTiming | None = None, ahead: bool = False) -> Plan:
        """The next step's plan. Its pages are allocated; `computed` changes only for those that are admitted.

        ahead: a step is in flight, and the plan is for the one behind it. timing: of steps so far, where a bound on the
        time between tokens is to be kept.
        """
        plan = Plan(self._config.max_batch_tokens, now, ahead=ahead)
        decoding = [seq for seq in self.running if seq.due == 1]
        for seq in decoding:
            if seq.state is SeqState.RUNNING:
                plan.add(seq, self._make_room(seq, plan))
        plan.budget = prefill_budget(plan.budget, len(plan.decodes), timing, self._config.inter_token_ms)
        for seq in [seq for seq in self.running if seq.due > 1]:
            if plan.budget and seq.state is SeqState.RUNNING:
                plan.add(seq, self._make_room(seq, plan))
        if not plan.stalled:
            self._admit(plan, now)
        return plan

    def _spare(self) -> list[int]:
        return [spare_pages(self.running, self._memory.page_size, group.window) for group in self._memory.groups]

    def _make_room(self, seq: Seq, plan: Plan) -> int:
        """Pages for a running sequence's next step, from the cache, else from whoever is youngest; room in tokens.

        Only tokens that were sampled, or a window that has moved on, ask for more than the sequence was admitted with:
        what it gives up may be held by others, too. Then a shorter chunk has to do, as long as there is any room.
        """
        memory = self._memory
        while not memory.grow(seq, len(seq.tokens) + seq.future):
            if memory.windowed and memory.grow(seq, seq.reached + 1):
                return memory.covered(seq) - seq.reached
            if plan.ahead:
                plan.stalled = True
                return 0
            victim = pick_victim(self._holders(), seq)
            if victim is None and memory.windowed and seq.prefill_only:
                # The held may wait for those in the queue, whom this one would keep out if it paused with its pages.
                victim = pick_giver(self._held.values(), seq) or seq
            if victim is None:
                return 0
            self.retract(victim, plan)
            if victim is seq:
                return 0
        # Of a window's pages there are those for one step; one in flight has its part of them.
        return seq.due if seq.flying is None else min(seq.due, memory.covered(seq) - seq.reached)

    def _holders(self) -> Iterator[Seq]:
        yield from self.running
        yield from (seq for seq in self.waiting if any(seq.pages))

    def retract(self, victim: Seq, plan: Plan) -> None:
        """Takes a sequence's pages; it waits with its tokens, and later computes what the cache then lacks."""
        plan.drop(victim)
        self._memory.close(victim)
        victim.retractions += 1
        if len(victim.prompt_logprobs) < victim.prompt_len:
            victim.prompt_logprobs.clear()
        if victim.state is not SeqState.WAITING:
            victim.waiting_since = plan.now
        self.enqueue(victim)
        plan.retracted.append(victim)

    def _admit(self, plan: Plan, now: float) -> None:
        """Lets waiting sequences run, best first, until the budget, the places or the pages are used up.

        The first that cannot have its pages stops all others but those that need none, who make room by finishing.
        """
        if self._stands_still(now):
            return
        self.blocked = None
        stuck: Queued | None = None
        for item in self._in_order(plan, now):
            if plan.budget == 0 or len(self.running) >= self._config.running_limit:
                return
            if stuck is not None and not self._covered(item.seq):
                continue
            if self._twins is not None and self._twins.waits(item.seq, item.packed, item.ready):
                continue
            if self._open(item):
                self._charge(item, now)
                self._start(item, plan)
            elif stuck is None:
                stuck = item
        if stuck is not None and (self.running or not plan.ahead):
            self.blocked = stuck.seq if is_aged(stuck.seq, now, self._config.ageing_s) else None
            self._force(stuck, plan)
            self._note_standstill(now)

    def _stands_still(self, now: float) -> bool:
        was = self._standstill
        self._standstill = None
        if was is None or was.changes != self._versions() or now >= was.until:
            return False
        self._standstill = was
        return True

    def _note_standstill(self, now: float) -> None:
        """Remembers a queue whose first cannot have its pages."""
        changes = (next_ageing(item.seq, now, self._config.ageing_s) for item in self._queue.values())
        self._standstill = Standstill(self._versions(), min(changes, default=math.inf))

    def _versions(self) -> tuple[int, int, int]:
        return self._changes, self._memory.cache.version, self._memory.slides

    def _in_order(self, plan: Plan, now: float) -> list[Queued]:
        if not self._queue or plan.budget == 0 or len(self.running) >= self._config.running_limit:
            return []
        self._refresh()

        def key(item: Queued) -> QueueKey:
            return queue_key(item.seq, item.ready, now, self._config.ageing_s)

        order = sorted((item for item in self._queue.values() if not self._yields(item.seq, now)), key=key)
        self._balances = present(self._balances, (item.tenant for item in order))
        if len(self._balances) > 1:
            order = fair_order(order, self._balances, first=FAIR_STARTS)
        if self._passed >= PASSES:
            self._let_pass(order, now)
        return order

    def _let_pass(self, order: list[Queued], now: float) -> None:
        """Puts the oldest starved sequence before those of higher priority."""
        top = order[0].priority if order else 0
        ageing_s = self._config.ageing_s
        starved = [item for item in order if item.priority < top and is_starved(item.seq, now, ageing_s)]
        if starved:
            first = min(starved, key=lambda item: item.seq.arrival)
            order.insert(0, order.pop(order.index(first)))

    def _charge(self, item: Queued, now: float) -> None:
        """Its tenant pays for a sequence that is admitted, once: one that gave way has been paid for."""
        self._passed = 0 if is_starved(item.seq, now, self._config.ageing_s) else self._passed + 1
        if item.tenant in self._balances and not item.seq.charged:
            item.seq.charged = True
            self._balances = served(self._balances, item.tenant, item.cost)

    def _yields(self, seq: Seq, now: float) -> bool:
        """Whether a sequence without pages has to leave them to an older one that waits for KV."""
        claim = self._claim
        if claim is None or seq.node is not None or seq.order < claim.order:
            return False
        return is_aged(claim, now, self._config.ageing_s)

    def _covered(self, seq: Seq) -> bool:
        return seq.node is not None and self._memory.covered(seq) >= len(seq.tokens)

    def _open(self, item: Queued) -> bool:
        """Pages for all tokens of a sequence, with its cached prefix."""
        seq, tokens = item.seq, len(item.seq.tokens)
        if seq.node is None:
            return self._memory.open(seq, item.packed, tokens, self._spare())
        if item.version != self._memory.cache.version:
            self._look_up(item)
        if item.cached <= seq.computed:
            return self._memory.grow(seq, tokens)
        # While it waited with what was cached when it came, others computed more of the same prompt.
        return self._memory.reopen(seq, item.packed, tokens)

    def _start(self, item: Queued, plan: Plan) -> None:
        """Moves a sequence that has its pages from the queue into the batch."""
        seq = item.seq
        if seq.pending == 0:
            self.hold(seq)
            plan.cached.append(seq)
            return
        self.remove(seq)
        seq.state = SeqState.RUNNING
        insort(self.running, seq, key=lambda each: each.order)
        if self._twins is not None and seq.pending > 1:
            # What it computes of its output, again or anew, reaches the cache at its end alone.
            self._twins.started(seq, item.packed[: seq.prompt_len * TOKEN_BYTES])
        plan.add(seq, seq.pending)

    def _force(self, stuck: Queued, plan: Plan) -> None:
        """When nothing runs, those who hold pages without using them give way to the queue's first."""
        while not self.running:
            holders = [*(seq for seq in self.waiting if any(seq.pages)), *self._held.values()]
            giver = pick_giver(holders, stuck.seq)
            if giver is None:
                return
            self.retract(giver, plan)
            if self._open(stuck):
                self._start(stuck, plan)
                return

    def _refresh(self) -> None:
        """Looks up a few queued sequences again: what others computed meanwhile may be theirs, too."""
        version = self._memory.cache.version
        if not self._stale:
            self._stale = [item for item in self._queue.values() if item.version != version]
        for _ in range(min(REFRESHES, len(self._stale))):
            self._look_up(self._stale.pop())

    def _look_up(self, item: Queued) -> None:
        item.version = self._memory.cache.version
        item.cached = self._memory.match(item.seq, item.packed).tokens
