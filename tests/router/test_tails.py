"""The router's memory of partial blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.cache.tails import AHEAD_OF_EVENTS_S, Tail, TailMemory, common_prefix
from router.open_request import Chain
from tandem.kv import BLOCK_TOKENS, HashRoot, block_hashes

ROOT = HashRoot("c", "m", "float32").digest()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_second_turn_of_a_short_chat_is_recognised() -> None:
    memory = TailMemory(8, Clock())
    memory.add("d0", ROOT, tuple(range(20)))
    prompt = (*range(20), 99, 98)
    assert memory.extend({}, Chain(ROOT, ()), prompt) == {"d0": 20}
    assert memory.extend({}, Chain(ROOT, ()), (0, 1, 50)) == {"d0": 2}


def test_a_finished_sequence_is_recognised_whatever_its_length() -> None:
    for prompt_len in (3, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 5, 3 * BLOCK_TOKENS):
        for output_len in (0, 1, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 7):
            memory, sequence = TailMemory(8, Clock()), tuple(range(prompt_len + output_len))
            known = block_hashes(ROOT, sequence[:prompt_len])
            memory.remember("d0", Chain(ROOT, tuple(known)), sequence[len(known) * BLOCK_TOKENS :])
            following = (*sequence, 9999, 9998)
            found = memory.extend({}, Chain(ROOT, tuple(block_hashes(ROOT, following))), following)
            assert found == {"d0": len(sequence)}


def test_a_tail_adds_to_what_the_index_knows() -> None:
    memory, sequence = TailMemory(8, Clock()), tuple(range(BLOCK_TOKENS + 10))
    hashes = block_hashes(ROOT, sequence)
    memory.add("d0", hashes[-1], sequence[BLOCK_TOKENS:])
    prompt = (*sequence, 7, 7, 7)
    found = memory.extend({"d0": 1, "d1": 1}, Chain(ROOT, tuple(block_hashes(ROOT, prompt))), prompt)
    assert found == {"d0": BLOCK_TOKENS + 10, "d1": BLOCK_TOKENS}


def test_whole_blocks_are_vouched_for_only_until_events_had_time_to_come() -> None:
    clock = Clock()
    memory, sequence = TailMemory(8, clock), tuple(range(BLOCK_TOKENS + 10))
    hashes = block_hashes(ROOT, sequence)
    memory.add("d0", hashes[-1], sequence[BLOCK_TOKENS:])
    clock.now = AHEAD_OF_EVENTS_S / 2
    assert memory.extend({}, Chain(ROOT, tuple(hashes)), sequence) == {"d0": BLOCK_TOKENS + 10}
    clock.now = AHEAD_OF_EVENTS_S * 2
    assert memory.extend({}, Chain(ROOT, tuple(hashes)), sequence) == {}
    assert memory.extend({"d0": 1}, Chain(ROOT, tuple(hashes)), sequence) == {"d0": BLOCK_TOKENS + 10}


def test_a_prompt_that_goes_on_otherwise_meets_the_blocks_and_none_of_the_other_tails() -> None:
    clock = Clock()
    memory, common = TailMemory(2048, clock), tuple(range(BLOCK_TOKENS))
    chain = Chain(ROOT, tuple(block_hashes(ROOT, common)))
    for first in range(1000):
        memory.remember("d0", chain, (first, 1))
        memory.remember("d1", Chain(ROOT, ()), (9000 + first, 1, 2))
    looked_at = memory._tails = Counted(memory._tails)
    assert memory.extend({}, chain, (*common, 5000)) == {"d0": BLOCK_TOKENS}
    assert memory.extend({}, chain, (*common, 7, 1, 9))["d0"] == BLOCK_TOKENS + 2
    assert looked_at.reads < 10
    clock.now = AHEAD_OF_EVENTS_S * 2
    assert memory.extend({}, chain, (*common, 5000)) == {}


class Counted(OrderedDict[Any, Tail]):
    """Counts how often something in it is looked at."""

    reads = 0

    def __getitem__(self, key: Any) -> Tail:
        self.reads += 1
        return super().__getitem__(key)


def test_a_dead_worker_is_forgotten_and_the_oldest_goes_first() -> None:
    memory = TailMemory(2, Clock())
    for number, worker in enumerate(("d0", "d1", "d1")):
        memory.add(worker, ROOT, (number, 1))
    assert len(memory) == 2
    assert memory.extend({}, Chain(ROOT, ()), (0, 1)) == {}
    assert memory.extend({}, Chain(ROOT, ()), (1, 1)) == {"d1": 2}
    memory.drop("d1")
    assert len(memory) == 0
    memory.check_integrity()


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0


class Machine(RuleBasedStateMachine):
    """Any order of calls keeps both views equal and the bound kept."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = TailMemory(5, Clock())

    @rule(worker=st.sampled_from("abc"), parent=st.sampled_from([b"x", b"y"]), first=st.integers(0, 3))
    def remember(self, worker: str, parent: bytes, first: int) -> None:
        self.memory.add(worker, parent, (first, 1, 2))
        assert self.memory.extend({}, Chain(parent, ()), (first, 1, 2, 3))[worker] == 3

    @rule(worker=st.sampled_from("abc"))
    def drop(self, worker: str) -> None:
        self.memory.drop(worker)
        assert worker not in self.memory.extend({}, Chain(b"x", ()), (0,))

    @invariant()
    def sound(self) -> None:
        self.memory.check_integrity()


TestMachine = Machine.TestCase
