"""Two engines under random load with few pages: whatever happens, outputs are the naive ones and nothing leaks."""

from __future__ import annotations

from unittest import TestCase

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.cluster import CacheEvent, EventKind
from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.radix import NO_PAGE, unpack
from tandem.engine.sequence import Seq, SeqState
from tandem.kv import BLOCK_TOKENS, BlockHash, Span, block_hashes
from tandem.testing.drafter import GuessingDrafter
from tandem.testing.engine import VOCAB, FakePool, FakeRunner, make_seq, naive_continuation, windowed_layout
from tandem.types import FinishReason, SamplingParams

ROOTS = (b"a", b"b")


class EngineMachine(RuleBasedStateMachine):
    """A decode engine that takes sequences, locally or by hand-over, from a prefill engine of another page size."""

    page_size = 1
    caching = True
    windows: tuple[int | None, ...] = (None,)
    tokens = 96
    """That fit into the pages of a group."""
    window_tokens = 96
    """The same, of groups with a window."""
    repeats = 1
    """How long prompts are that share beginnings."""
    adaptive = False
    drafts = "none"
    """Or `chain`, or `tree`: what the decode engine's drafter proposes, good and bad."""
    overlap = False

    @initialize(budget=st.sampled_from([3, 8, 40]), running=st.sampled_from([2, 8]))
    def begin(self, budget: int, running: int) -> None:
        self.now = 1.0
        self.layout = windowed_layout(*self.windows)
        self.decode = self.make(self.page_size, budget, running, self.caching)
        self.prefill = self.make(4, budget, running, True)
        self.seqs: list[Seq] = []
        self.naive: dict[str, list[int]] = {}
        self.moving: dict[str, tuple[Seq, Seq]] = {}
        """Decode sequence and its prefill-only twin, by the former's id."""
        self.moved: set[str] = set()
        self.landed: dict[str, int] = {}
        self.told: set[BlockHash] = set()

    def make(self, page_size: int, budget: int, running: int, caching: bool) -> Engine:
        pages = [(self.tokens if window is None else self.window_tokens) // page_size for window in self.windows]
        pool = FakePool(pages, page_size, self.layout)
        config = EngineConfig(
            budget,
            running,
            ageing_s=1.0,
            prefix_cache=caching,
            overlap=self.overlap,
            draft_adaptive=self.adaptive,
        )
        drafter = None
        if self.drafts != "none":
            drafter = GuessingDrafter(lambda seq: self.naive[seq.seq_id], VOCAB, self.drafts == "tree", seed=budget)
        return Engine(FakeRunner(pool), pool, config, clock=self.clock, drafter=drafter)

    def clock(self) -> float:
        self.now += 1e-4
        return self.now

    def draw_seq(self, data: st.DataObject) -> Seq:
        """Prompts that often share prefixes, of one token or of many."""
        bases = [[], [1, 2, 3, 4, 5, 6, 7] * 5 * self.repeats, [1, 2, 3, 9] * 6 * self.repeats]
        base = data.draw(st.sampled_from(bases))
        own = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
        prompt = base[: data.draw(st.integers(0, len(base)))] + own
        room = data.draw(st.sampled_from([0, 1, 5, 20, self.tokens - len(prompt)]))
        logprobs = data.draw(st.sampled_from([None, None, None, 0]))
        sampling = SamplingParams(temperature=0, max_tokens=room, prompt_logprobs=logprobs)
        eos = frozenset(data.draw(st.sampled_from([(), (3, 4, 5)])))
        root = data.draw(st.sampled_from(ROOTS))
        seq = make_seq(f"s{len(self.seqs)}", prompt, sampling=sampling, eos_ids=eos, root=root)
        self.seqs.append(seq)
        self.naive[seq.seq_id] = naive_continuation(prompt, sampling, eos, self.layout)
        return seq

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        self.decode.add(self.draw_seq(data))

    @rule(data=st.data(), opened=st.booleans())
    def hand_over(self, data: st.DataObject, opened: bool) -> None:
        seq = self.draw_seq(data)
        if len(seq.tokens) == 1 or seq.sampling.prompt_logprobs is not None:
            self.decode.add(seq)
            return
        seq.state = SeqState.WAITING_KV
        self.decode.add(seq)
        twin = make_seq(seq.seq_id, seq.tokens[:-1], prefill_only=True, root=seq.root)
        self.prefill.add(twin)
        if opened:
            self.prefill.open_cached(twin)
        self.moving[seq.seq_id] = seq, twin
        self.moved.add(seq.seq_id)

    @precondition(lambda self: self.moving)
    @rule()
    def reserve(self) -> None:
        """The oldest first, as the worker does: two that each hold what the other needs would wait for ever."""
        seq = next((seq for seq, _ in self.moving.values() if seq.node is None), None)
        if seq is not None:
            before = self.decode.status().retractions
            cached = self.decode.reserve(seq)
            assert before == self.decode.status().retractions
            if cached is not None:
                self.landed[seq.seq_id] = max(cached, self.layout.moved_from(seq.prompt_len - 1))

    @precondition(lambda self: self.landed)
    @rule(data=st.data(), count=st.integers(1, 30))
    def move(self, data: st.DataObject, count: int) -> None:
        self.move_span(data.draw(st.sampled_from(sorted(self.landed))), count)

    def move_span(self, name: str, count: int) -> None:
        seq, twin = self.moving[name]
        at = self.landed[name]
        count = min(count, twin.computed - at)
        if count > 0:
            data = bytearray(self.layout.span_bytes(Span(at, count), len(twin.tokens)))
            self.prefill.export_span(twin, Span(at, count), data)
            self.decode.import_span(seq, Span(at, count), data)
            self.landed[name] = at + count
        if self.landed[name] == seq.prompt_len - 1:
            self.finish_move(name)

    def finish_move(self, name: str) -> None:
        seq, twin = self.moving.pop(name)
        self.decode.landed(seq, self.landed.pop(name, 0))
        self.prefill.cancel(twin.seq_id)

    @precondition(lambda self: self.moving)
    @rule(data=st.data())
    def give_up_moving(self, data: st.DataObject) -> None:
        self.finish_move(data.draw(st.sampled_from(sorted(self.moving))))

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.seqs))
        self.decode.cancel(seq.seq_id)
        self.landed.pop(seq.seq_id, None)
        if self.moving.pop(seq.seq_id, None):
            self.prefill.cancel(seq.seq_id)

    @rule(steps=st.integers(1, 6), seconds=st.sampled_from([0.0, 0.0, 3.0]))
    def step(self, steps: int, seconds: float) -> None:
        self.now += seconds
        for _ in range(steps):
            self.decode.step()
            self.prefill.step()

    @rule()
    def release(self) -> None:
        """Everything held that nobody moves any more would be a leak; what is held is still being moved."""
        held = {seq.seq_id for seq in self.prefill.seqs.values() if seq.state is SeqState.HELD}
        assert held <= set(self.moving)

    @rule()
    def drain_events(self) -> None:
        replay(self.told, self.decode.drain_events())
        assert self.told == whole_blocks(self.decode, self.page_size)

    @invariant()
    def sound(self) -> None:
        for engine in (self.decode, self.prefill):
            engine.check_integrity()
            check_windows(engine, self.moved)
        for seq in self.seqs:
            assert seq.tokens[seq.prompt_len :] == self.naive[seq.seq_id][: seq.output_len]

    def teardown(self) -> None:
        for _ in range(20_000):
            if not (self.decode.has_work() or self.prefill.has_work() or self.moving):
                break
            self.now += 0.01
            self.decode.step()
            self.prefill.step()
            self.reserve()
            for name in list(self.moving):
                if name in self.landed:
                    self.move_span(name, 1000)
        for seq in self.seqs:
            assert seq.state is SeqState.FINISHED, seq
            if seq.finish is not FinishReason.CANCELLED:
                assert seq.tokens[seq.prompt_len :] == self.naive[seq.seq_id]
        assert self.decode.idle_leaks() == []
        assert self.prefill.idle_leaks() == []


def replay(blocks: set[BlockHash], events: list[CacheEvent]) -> None:
    for event in events:
        if event.kind is EventKind.STORED:
            assert not blocks & set(event.hashes)
            blocks |= set(event.hashes)
        else:
            assert blocks >= set(event.hashes)
            blocks -= set(event.hashes)


def whole_blocks(engine: Engine, page_size: int) -> set[BlockHash]:
    """Hashes of the blocks in the tree, from nothing but the tokens along its paths."""
    found: set[BlockHash] = set()
    for root, node in engine.memory.cache.nodes():
        path, above = node.key, node.parent
        while above is not None:
            path, above = above.key + path, above.parent
        found |= set(block_hashes(root, unpack(path)))
    return found


def check_windows(engine: Engine, moved: set[str]) -> None:
    """A sequence holds few pages of groups with a window, however long it is.

    moved: those that are at an end of a hand-over, or were; it is of whole blocks.
    """
    memory, chunk = engine.memory, engine.config.max_batch_tokens
    for seq in engine.seqs.values():
        for number in memory.windowed if seq.pages else ():
            window, size = memory.groups[number].window or 0, memory.page_size
            held = sum(page != NO_PAGE for page in seq.pages[number])
            most = -(-(window - 1) // size) - (-(chunk - 1) // size) + 1
            if seq.seq_id in moved:
                most = max(most, -(-(window - 1) // BLOCK_TOKENS) * BLOCK_TOKENS // size + BLOCK_TOKENS // size)
            assert held <= most, (seq.seq_id, held, most)


def machine(size: int, caching: bool = True, **values: object) -> type[TestCase]:
    class Sized(EngineMachine):
        page_size = size

    Sized.caching = caching
    for name, value in values.items():
        setattr(Sized, name, value)
    case: type[TestCase] = Sized.TestCase
    examples = 25 if len(Sized.windows) == 1 and Sized.windows[0] is None else 12
    case.settings = settings(max_examples=examples, stateful_step_count=30, deadline=None)  # type: ignore[attr-defined]
    return case


TestPagesOfOne = machine(1)
TestChainsInPagesOfOne = machine(1, drafts="chain")
TestTreesInPagesOfOne = machine(1, drafts="tree")
TestTreesInPagesOfFour = machine(4, drafts="tree", adaptive=True)
TestTreesWithWindows = machine(2, drafts="tree", windows=(None, 5, 2), window_tokens=128, tokens=256, repeats=5)
TestChainsWithoutCache = machine(4, caching=False, drafts="chain", windows=(9, 3), window_tokens=128, tokens=200)
TestPagesOfFour = machine(4)
TestPagesOfSixteen = machine(16)
TestWithoutCache = machine(4, caching=False)
TestAWindowAlone = machine(4, windows=(6,), window_tokens=128, tokens=300, repeats=6)
TestAWindowBesideFullAttention = machine(2, windows=(None, 5), window_tokens=128, tokens=256, repeats=5)
TestAWindowOfManyPages = machine(1, windows=(None, 40), window_tokens=128, tokens=200, repeats=4)
TestThreeGroups = machine(16, windows=(None, 20, 2), window_tokens=128, tokens=256, repeats=5)
TestOverlap = machine(4, overlap=True)
TestOverlapWithPagesOfOne = machine(1, overlap=True)
TestOverlapWithWindows = machine(2, overlap=True, windows=(None, 5), window_tokens=128, tokens=256, repeats=5)
TestOverlapWithoutCache = machine(
    1, caching=False, overlap=True, windows=(9, 3), window_tokens=128, tokens=200, repeats=5
)
TestWindowsWithoutCache = machine(4, caching=False, windows=(9, 3), window_tokens=128, tokens=200, repeats=5)
