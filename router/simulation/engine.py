"""A simulated worker's engine: a queue of prompts, chunks under a token budget, and continuous batching of output."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Protocol

from router.simulation.block_cache import BlockCache
from router.simulation.clock import Clock
from router.simulation.cores import Cores
from router.simulation.setting import Machine
from tandem.cluster import StepTiming
from tandem.kv import BlockHash
from tandem.step_timing import TimingFit

AGEING_S = 2.0
"""Prompts that waited longer go first; else those with the longest cached prefix. As the workers' engine has it."""
REFRESHES = 8
"""Queued prompts looked up again in one step."""
RUN = 16
"""Steps of decoding alone that are simulated as one event, unless something happens meanwhile."""


@dataclass(slots=True, eq=False)
class Prompt:
    """Prompt tokens to compute: all of a prompt, or all but the last one where another worker samples."""

    hashes: tuple[BlockHash, ...]
    """Of its whole blocks within `tokens`."""
    tokens: int
    on_start: Callable[[int], None]
    """Called with the tokens found cached, when its first step begins."""
    on_progress: Callable[[int], None]
    """Called with the tokens that have KV, after each of its steps."""
    arrived: float = 0.0
    order: int = 0
    known: int = 0
    """Tokens with KV; while it waits, those last seen in the cache."""
    held: int = 0
    """Blocks it has in use."""


@dataclass(slots=True, eq=False)
class _Run:
    """Equal steps one after another; more than one only where they do nothing but decode."""

    began: float
    ms: float
    """Of each."""
    steps: int
    outputs: int
    tokens: int
    chunks: list[tuple[Prompt, int]]
    fresh: list[Output]


@dataclass(slots=True, eq=False)
class Output:
    """Tokens to sample, one in each step."""

    tokens: int
    context: int
    """Tokens it looks back on at first."""
    on_first: Callable[[], None]
    on_end: Callable[[], None]
    ends: int = 0
    """The step it ends with."""


class Host(Protocol):
    """What an engine tells its worker."""

    def stored(self, hashes: tuple[BlockHash, ...], parent: BlockHash) -> None:
        """Blocks have come into the cache."""

    def stepped(self, milliseconds: float, tokens: int) -> None:
        """Steps of so long have ended, in which sequences got so many tokens altogether."""


class Engine:
    """One worker's steps in virtual time. It runs whenever there is something to do."""

    def __init__(
        self,
        clock: Clock,
        machine: Machine,
        cache: BlockCache,
        block_tokens: int,
        rng: Random,
        noise: float,
        host: Host,
        cores: Cores | None = None,
    ) -> None:
        """cores: shared with other engines and processes."""
        self.busy_s = 0.0
        self.queued_tokens = 0
        """Prompt tokens to be computed, as far as the cache is known."""
        self._clock = clock
        self._machine = machine
        self._cache = cache
        self.prompt_tokens = 0
        """Of prompts being computed: they take up memory."""
        self._block_tokens = block_tokens
        self._rng = rng
        self._noise = noise
        self._host = host
        self._cores = cores
        self._queue: list[Prompt] = []
        self._prompts: deque[Prompt] = deque()
        self._joining: list[Output] = []
        self._outputs: list[tuple[int, int, Output]] = []
        self.context = 0
        """Tokens that its decoding sequences look back on."""
        self._steps = 0
        self._order = 0
        self._stepping = False
        self._run: _Run | None = None
        self._fit = TimingFit()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._prompts) + len(self._outputs) + len(self._joining)

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._queue)

    @property
    def timing(self) -> StepTiming | None:
        """What a real worker would report: fitted to its steps, of their tokens alone."""
        return self._fit.fit()

    def compute(self, prompt: Prompt) -> None:
        """Queues a prompt."""
        prompt.arrived, prompt.order = self._clock.now, self._order
        self._order += 1
        prompt.known = self._cached(prompt)
        self.queued_tokens += prompt.tokens - prompt.known
        self._queue.append(prompt)
        self._wake()

    def generate(self, output: Output) -> None:
        """Lets a sequence sample from the next step on."""
        self._joining.append(output)
        self._wake()

    def _cached(self, prompt: Prompt) -> int:
        return min(self._cache.match(prompt.hashes) * self._block_tokens, prompt.tokens)

    def _wake(self) -> None:
        # Not at once: what arrives at the same moment shares the step.
        if not self._stepping:
            self._stepping = True
            self._clock.after(0.0, self._next)
        elif self._run is not None and self._run.steps > 1:
            self._cut_short(self._run)

    def _cut_short(self, run: _Run) -> None:
        """What has come takes part as soon as the step under way has ended."""
        steps = int((self._clock.now - run.began) * 1e3 / run.ms) + 1
        if steps < run.steps:
            self._begin(replace(run, steps=steps))

    def _begin(self, run: _Run) -> None:
        self._run = run
        if self._cores is None:
            self._clock.at(run.began + run.steps * run.ms / 1e3, self._end, run)
        else:
            self._cores.run(run.ms / 1e3, partial(self._end, run))

    def _next(self) -> None:
        if self._cores is None:
            self._step()
        else:
            self._cores.take(self._step)

    def _give_place(self) -> None:
        if self._cores is not None:
            self._cores.give()

    def _step(self) -> None:
        for output in self._joining:
            output.ends = self._steps + output.tokens
            self.context += output.context
            heapq.heappush(self._outputs, (output.ends, self._order, output))
            self._order += 1
        fresh, self._joining = self._joining, []
        outputs = len(self._outputs)
        chunks = self._chunks(self._machine.max_batch_tokens - outputs)
        tokens = outputs + sum(count for _, count in chunks)
        if not tokens and not chunks:
            self._stepping, self._run = False, None
            self._give_place()
            return
        steps = 1
        if not (chunks or fresh or self._queue or self._cores):
            steps = min(RUN, self._outputs[0][0] - self._steps)
        # In each step every sequence looks back on one token more.
        context = self.context + outputs * (steps - 1) / 2
        prefix = sum(count * prompt.known for prompt, count in chunks)
        noise = max(0.1, self._rng.gauss(1.0, self._noise)) if tokens else 0.0
        ms = self._machine.step_ms(tokens, context, prefix) * noise
        self._begin(_Run(self._clock.now, ms, steps, outputs, tokens, chunks, fresh))

    def _chunks(self, budget: int) -> list[tuple[Prompt, int]]:
        """Prompt tokens of a step: those under way first, then from the queue."""
        chunks = []
        for prompt in self._prompts:
            count = min(prompt.tokens - prompt.known, budget)
            budget -= count
            if count:
                chunks.append((prompt, count))
        if budget > 0 and self._queue:
            for prompt in self._in_order():
                if budget <= 0 or self.running >= self._machine.max_running:
                    break
                self._start(prompt)
                count = min(prompt.tokens - prompt.known, budget)
                budget -= count
                chunks.append((prompt, count))
        return chunks

    def _in_order(self) -> list[Prompt]:
        now = self._clock.now
        for prompt in self._queue[:REFRESHES]:
            self._look_up(prompt)
        return sorted(
            self._queue,
            key=lambda p: (False, p.arrived, p.order) if now - p.arrived >= AGEING_S else (True, -p.known, p.order),
        )

    def _look_up(self, prompt: Prompt) -> None:
        known = self._cached(prompt)
        self.queued_tokens += prompt.known - known
        prompt.known = known

    def _start(self, prompt: Prompt) -> None:
        self._look_up(prompt)
        self._queue.remove(prompt)
        self._prompts.append(prompt)
        self.prompt_tokens += prompt.tokens
        prompt.held = self._cache.acquire(prompt.hashes)
        prompt.on_start(prompt.known)

    def _end(self, run: _Run) -> None:
        if run is not self._run:
            return  # it was cut short
        self._run = None
        self._steps += run.steps
        self.context += run.outputs * run.steps
        # Shared cores are slower while others use them, which workers see as longer steps.
        ms = run.ms if self._cores is None else (self._clock.now - run.began) * 1e3 / run.steps
        self.busy_s += ms * run.steps / 1e3
        if run.tokens:
            for _ in range(run.steps):
                self._fit.add(run.tokens, ms / 1e3)
        for prompt, count in run.chunks:
            self._advance(prompt, count)
        for output in run.fresh:
            output.on_first()
        while self._outputs and self._outputs[0][0] <= self._steps:
            _, _, output = heapq.heappop(self._outputs)
            self.context -= output.context + output.tokens
            output.on_end()
        self._host.stepped(ms, run.outputs * run.steps)
        self._give_place()
        self._next()

    def _advance(self, prompt: Prompt, count: int) -> None:
        prompt.known += count
        self.queued_tokens -= count
        whole = min(prompt.known // self._block_tokens, len(prompt.hashes))
        if whole > prompt.held:
            stored = self._cache.store(prompt.hashes[prompt.held : whole])
            if stored:
                # Others may have stored the front of it meanwhile.
                first = prompt.hashes.index(stored[0], prompt.held)
                parent = prompt.hashes[first - 1] if first else b""
                self._host.stored(stored, parent)
            prompt.held = whole
        if prompt.known == prompt.tokens:
            self._prompts.remove(prompt)
            self.prompt_tokens -= prompt.tokens
        prompt.on_progress(prompt.known)
