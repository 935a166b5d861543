"""The inference engine of a worker: continuous batching over paged KV, a prefix cache, and both ends of a KV hand-over.

One thread owns an engine and everything in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from tandem.cluster import CacheEvent
from tandem.engine import audit
from tandem.engine.commit import commit_row
from tandem.engine.memory import KvMemory, match_limit
from tandem.engine.output import EngineStatus, Progress, SeqOutput, StepOutput
from tandem.engine.overlap import Flight, ended, leads_on
from tandem.engine.policy import EngineConfig
from tandem.engine.protocols import PoolLike, RunnerLike
from tandem.engine.radix import pack
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Batch, Sampled, Seq, SeqState
from tandem.engine.spec.base import Drafter
from tandem.engine.spec.speculation import Speculation
from tandem.errors import ContextTooLong
from tandem.kv import KvLayout, Span
from tandem.step_timing import TimingFit
from tandem.types import FinishReason


class Engine:
    """Sequences in, tokens out. Knows a sequence from `add` or `reserve` until it ends, is released or cancelled."""

    def __init__(
        self,
        runner: RunnerLike,
        pool: PoolLike,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        drafter: Drafter | None = None,
    ) -> None:
        """drafter: None decodes a token a step; with one, steps do not overlap."""
        self.config = config
        shares = config.verify_share, config.tenant_share
        self.memory = KvMemory(pool, config.prefix_cache, config.max_batch_tokens, *shares)
        self.scheduler = Scheduler(self.memory, config)
        self.seqs: dict[str, Seq] = {}
        """Every sequence that is not finished."""
        self._runner = runner
        self._pool = pool
        self._clock = clock
        self._timing = TimingFit()
        self._flight: Flight | None = None
        """A step that was launched and is not committed."""
        self._committed = -math.inf
        """When the last step was, seconds of the clock."""
        self.speculation: Speculation | None = None
        if drafter is not None:
            self.speculation = Speculation(drafter, self.memory, config.draft_tokens, config.draft_adaptive)
            self.memory.on_close = self.speculation.forget
        # A draft follows the tokens of the step before it: these have to be looked at first.
        self._overlaps = config.overlap and drafter is None
        self._admitted = 0
        self._retractions = 0

    @property
    def layout(self) -> KvLayout:
        """What one token's KV consists of."""
        return self._pool.layout

    @property
    def capacity_tokens(self) -> int:
        """Tokens, prompt and output, that one sequence can have."""
        return self.memory.capacity_tokens

    def add(self, seq: Seq) -> None:
        """Takes a sequence: into the queue, or, in state WAITING_KV, aside until `reserve` and `landed`.

        Sets `order`, and `arrival` where it is 0. Raises ContextTooLong when the pages could never hold it, ValueError
        when it is empty or finished, or its id is taken.
        """
        if seq.seq_id in self.seqs:
            raise ValueError(f"seq_id {seq.seq_id} is taken")
        if seq.state is SeqState.FINISHED:
            raise ValueError(f"sequence {seq.seq_id} is finished")
        if not seq.tokens:
            raise ValueError(f"sequence {seq.seq_id} has no tokens; at least 1 is needed")
        total = len(seq.tokens) if seq.prefill_only else seq.prompt_len + seq.sampling.max_tokens
        if total > self.capacity_tokens:
            raise ContextTooLong(f"prompt and max_tokens are {total} tokens; this worker holds {self.capacity_tokens}")
        self._admitted += 1
        seq.order = self._admitted
        seq.waiting_since = seq.arrival = seq.arrival or self._clock()
        self.seqs[seq.seq_id] = seq
        if seq.state is not SeqState.WAITING_KV:
            self.scheduler.enqueue(seq)

    def cancel(self, seq_id: str) -> None:
        """Ends a sequence in any state and frees what it held; whole pages stay in the cache. Unknown ids are fine."""
        seq = self.seqs.get(seq_id)
        if seq is not None:
            self._end(seq, FinishReason.CANCELLED)

    def _end(self, seq: Seq, finish: FinishReason | None) -> None:
        self.scheduler.remove(seq)
        seq.state, seq.finish = SeqState.FINISHED, finish
        del self.seqs[seq.seq_id]
        if seq.flying is None:
            self._close(seq)

    def _close(self, seq: Seq) -> None:
        self.memory.close(seq)
        self.scheduler.note_change()

    def has_work(self) -> bool:
        """Whether a step could do something: a sequence runs or is queued, or a step is in flight."""
        return len(self.scheduler) > 0 or self._flight is not None

    def step(self) -> StepOutput:
        """Schedule, forward, sample, commit; with overlap, the next step is launched before this one is committed.

        If the runner raises, no sequence has advanced: they can be stepped again, or cancelled.
        """
        flight = self._flight = self._flight or self._launch(None)
        behind = self._launch(flight) if self._overlaps and leads_on(flight) else None
        self._flight = None if behind is None or behind.idle else behind
        waiting = self._clock()
        sampled = self._collect(flight)
        computed = self._clock()
        outputs, progress = self._commit(flight, sampled)
        ended = self._clock()
        began = max(flight.started, self._committed)
        if flight.batch.rows:
            seconds = ended - began
            self._timing.add(flight.batch.num_tokens, seconds)
            if self.speculation is not None:
                self.speculation.measured(flight.batch, seconds)
        self._committed = ended
        return StepOutput(
            outputs=outputs,
            progress=progress,
            retracted=tuple(flight.plan.retracted),
            batch_tokens=flight.batch.num_tokens,
            schedule_s=flight.schedule_s,
            forward_s=flight.launch_s + computed - waiting,
            commit_s=ended - computed,
            drafts=() if self.speculation is None else self.speculation.drain(),
            began=began,
            ended=ended,
        )

    def _launch(self, after: Flight | None) -> Flight:
        """Schedules a step and tells the device to do it, perhaps behind another."""
        started = self._clock()
        timing = self._timing.fit() if self.config.inter_token_ms else None
        plan = self.scheduler.schedule(started, timing, ahead=after is not None)
        if self.speculation is not None:
            self.speculation.draft(plan)
        batch = Batch(()) if plan.stalled else plan.batch
        scheduled = self._clock()
        handle = self._runner.launch(batch, after and after.handle) if batch.rows else None
        flight = Flight(plan, batch, handle, started, scheduled - started, self._clock() - scheduled)
        if self._overlaps:
            flight.lift()
        return flight

    def _collect(self, flight: Flight) -> list[Sampled]:
        """Waits for a step. If it failed, that behind it is given up, too."""
        if not flight.batch.rows:
            return []
        try:
            return self._runner.collect(flight.handle)
        except BaseException:
            for lost in filter(None, (flight, self._flight)):
                for row in lost.batch.rows:
                    if not lost.land(row):
                        self._close(row.seq)
            self._flight = None
            raise

    def _commit(self, flight: Flight, sampled: list[Sampled]) -> tuple[tuple[SeqOutput, ...], tuple[Progress, ...]]:
        """Advances sequences, shares what was computed of prompts, and lets go of those that are done."""
        outputs: list[SeqOutput] = []
        progress = [Progress(seq, seq.computed) for seq in flight.plan.cached if seq.state is SeqState.HELD]
        for row, result in zip(flight.batch.rows, sampled, strict=True):
            seq = row.seq
            if not flight.land(row):
                self._close(seq)
                continue
            output = commit_row(row, result)
            if output is not None:
                outputs.append(output)
            if self.speculation is not None:
                self.speculation.committed(row, output)
            if row.start < seq.prompt_len:
                progress.append(Progress(seq, seq.computed))
                # Of the output a drafter with KV of its own has guesses at most, until the sequence is closed.
                self.memory.share(seq, seq.prompt_len)
            if seq.finish is not None:
                self._end(seq, seq.finish)
            elif seq.prefill_only and seq.pending == 0:
                self.scheduler.hold(seq)
        self._retractions += len(flight.plan.retracted)
        return tuple(outputs), tuple(progress)

    # Hand-over, receiving side.

    def match_len(self, root: bytes, tokens: Sequence[int]) -> int:
        """How many of the tokens are cached now. Changes nothing."""
        return self.memory.match_len(root, tokens, len(tokens))

    def exportable(self, seq: Seq) -> int:
        """How many of a prefill-only sequence's tokens are cached now with all that their hand-over moves of them."""
        return self.memory.match(seq, pack(seq.tokens)).tokens

    def reserve(self, seq: Seq) -> int | None:
        """Pages for all tokens of a WAITING_KV sequence. Locks its cached prefix, whose length in tokens it returns.

        Adds the sequence if need be. None when pages cannot be had now (the cache is evicted for it, but nobody is
        retracted), or when an older sequence waits for them: ask again after a step, give up with `landed(seq, 0)`, or
        cancel. A second call changes nothing: who asked may have gone before the answer came.
        """
        if seq.seq_id not in self.seqs and seq.state is not SeqState.FINISHED:
            seq.state = SeqState.WAITING_KV
            self.add(seq)
        if seq.state is not SeqState.WAITING_KV:
            raise ValueError(f"sequence {seq.seq_id} cannot be reserved for: {seq.state.name}")
        if seq.node is None and not self.scheduler.open_reserved(seq):
            return None
        return seq.computed

    def import_span(self, seq: Seq, span: Span, data: Any) -> None:
        """Writes received KV into a reserved sequence's own pages. Raises ValueError on a span not wholly in these.

        data: what moves of the span in a hand-over of all tokens but the last; canonical bytes, a buffer of uint8.
        """
        if seq.state is not SeqState.WAITING_KV or seq.node is None:
            raise ValueError(f"sequence {seq.seq_id} has no pages reserved: {seq.state.name}")
        if span.start < seq.computed or span.end > len(seq.tokens) or span.count < 1:
            raise ValueError(f"span [{span.start}, {span.end}) must lie in [{seq.computed}, {len(seq.tokens)})")
        self._pool.scatter(seq.pages, span, len(seq.tokens) - 1, data)

    def landed(self, seq: Seq, computed: int) -> None:
        """Ends a hand-over: KV of the first `computed` tokens is in place, the rest is computed here.

        computed: prompt_len - 1 on success, less on a fallback; what was cached at `reserve` counts anyway. Where a
        layer's window at `computed` begins before what was to land, the pages are given back: the cache is asked anew.
        """
        if seq.state is not SeqState.WAITING_KV:
            raise ValueError(f"sequence {seq.seq_id} waits for no KV: {seq.state.name}")
        if computed > match_limit(seq) or (computed > 0 and seq.node is None):
            raise ValueError(f"computed is {computed}; {match_limit(seq)} is the limit, and 0 without reserved pages")
        if seq.node is not None:
            computed = max(seq.computed, computed)
            if self.memory.sees(seq, computed):
                seq.computed = computed
                self.memory.share(seq)
            else:
                self.memory.close(seq)
        self.scheduler.enqueue(seq)

    def leave(self, seq: Seq, computed: int) -> None:
        """Ends a WAITING_KV sequence that nobody goes on with: KV of its first `computed` tokens is the cache's.

        Whole pages, that is, and where a layer has a window no more than what is complete behind it. A sequence that
        was not taken yet, or has ended, stays as it is.
        """
        if seq.seq_id not in self.seqs:
            return
        if seq.node is not None and self.memory.sees(seq, computed := max(seq.computed, computed)):
            seq.computed = computed
        self._end(seq, None)

    # Hand-over, sending side.

    def open_cached(self, seq: Seq) -> int:
        """Locks what is cached of a queued prefill-only sequence, so that it can be exported before its turn comes.

        Returns how many tokens are computed now. All of them: the sequence is HELD at once.
        """
        if seq.state is SeqState.WAITING and seq.node is None:
            self.scheduler.open_queued(seq)
        return seq.computed

    def export_span(self, seq: Seq, span: Span, out: Any) -> None:
        """Copies what moves of computed KV into `out`, a writable buffer of uint8, in canonical order.

        It moves to where all the sequence's tokens are wanted: of layers with a window only what is seen from there.

        Raises ValueError beyond `computed`, which falls back to 0 when the sequence is retracted: a held one from which
        nothing was exported yet gives way to older ones when the pages are short.
        """
        if span.start < 0 or span.end > seq.computed or span.count < 1:
            raise ValueError(f"span [{span.start}, {span.end}) of {seq.seq_id} must lie in [0, {seq.computed})")
        self.scheduler.pin(seq)
        self._pool.gather(seq.pages, span, len(seq.tokens), out)

    def release(self, seq: Seq) -> None:
        """HELD to FINISHED: its pages are the cache's alone."""
        if seq.state is not SeqState.HELD:
            raise ValueError(f"sequence {seq.seq_id} is not held: {seq.state.name}")
        self._end(seq, None)

    # Reports.

    def drain_events(self) -> list[CacheEvent]:
        """What became of blocks since the last call. Block hashes are computed here: call it between steps."""
        return self.memory.cache.drain_events()

    def snapshot_events(self) -> list[CacheEvent]:
        """The whole cache as STORED events, as of the last `drain_events`."""
        return self.memory.cache.snapshot_events()

    def status(self) -> EngineStatus:
        """Load and cache now."""
        states = [seq.state for seq in self.seqs.values()]
        since = [s.waiting_since for s in self.seqs.values() if s.state in (SeqState.WAITING, SeqState.WAITING_KV)]
        return EngineStatus(
            running=states.count(SeqState.RUNNING),
            waiting=states.count(SeqState.WAITING) + states.count(SeqState.WAITING_KV),
            held=states.count(SeqState.HELD),
            queued_tokens=self.scheduler.queued_tokens(),
            free_pages=self.memory.free_pages,
            total_pages=self.memory.total_pages,
            cached_pages=self.memory.cached_pages,
            matched_tokens=self.memory.matched_tokens,
            prompt_tokens=self.memory.prompt_tokens,
            retractions=self._retractions,
            checked_pages=self.memory.checks.checked,
            corrupt_pages=self.memory.checks.corrupt,
            oldest_s=self._clock() - min(since) if since else 0.0,
            timing=self._timing.fit(),
        )

    def idle_leaks(self) -> list[str]:
        """What is still held though nothing should be: empty for an engine that is idle and sound."""
        flying = [] if self._flight is None else ["a step is in flight"]
        return [*flying, *audit.idle_leaks(self.memory, self.seqs.values())]

    def check_integrity(self) -> None:
        """Raises AssertionError when sequences, pages, cache and queue disagree."""
        audit.check_integrity(self.memory, self.scheduler, self.seqs.values(), ended(self._flight))
