"""Prompts that come together are computed once; nobody waits for what does not come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Seq
from tandem.engine.twins import LEAST_TOKENS
from tandem.testing.engine import FakePool, FakeRunner, make_seq, naive_continuation
from tandem.types import SamplingParams

PROMPT = list(range(1, 41))


class Bench:
    """An engine on fakes that counts what it computes."""

    def __init__(self, pages: int = 64, budget: int = 64, prefix_cache: bool = True, overlap: bool = False) -> None:
        pool = FakePool(pages, 4)
        self.runner = FakeRunner(pool)
        self.now = 0.0
        config = EngineConfig(max_batch_tokens=budget, prefix_cache=prefix_cache, overlap=overlap)
        self.engine = Engine(self.runner, pool, config, lambda: self.now)

    def add(self, name: str, prompt: list[int], max_tokens: int = 3, **fields: Any) -> Seq:
        seq = make_seq(name, prompt, max_tokens, **fields)
        self.engine.add(seq)
        return seq

    def step(self) -> None:
        self.engine.step()
        self.engine.check_integrity()

    def finish(self, *seqs: Seq) -> None:
        for _ in range(500):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work()
        assert self.engine.idle_leaks() == []
        for seq in seqs:
            assert seq.tokens[seq.prompt_len :] == naive_continuation(seq.tokens[: seq.prompt_len], seq.sampling)

    def computed(self, name: str) -> int:
        """Prompt tokens of a sequence that went through the model."""
        return sum(count for batch in self.runner.batches for seq, _, count in batch if seq == name and count > 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [16, 64, 256])
def test_the_same_prompt_is_computed_once(budget: int, overlap: bool) -> None:
    bench = Bench(budget=budget, overlap=overlap)
    twins = [bench.add(name, PROMPT) for name in "abc"]
    bench.finish(*twins)
    assert bench.computed("a") >= 39
    rest = 0 if budget > 40 else LEAST_TOKENS - 1
    assert max(bench.computed("b"), bench.computed("c")) <= rest, "their last token is all they compute"
    assert min(twins[1].cached_tokens, twins[2].cached_tokens) >= 39 - rest


def test_of_prompts_that_begin_alike_the_rest_is_computed_by_each() -> None:
    bench = Bench(budget=256)
    first, second = bench.add("a", PROMPT + [3] * 10), bench.add("b", PROMPT + [4] * 10)
    bench.finish(first, second)
    assert (bench.computed("a"), bench.computed("b")) == (50, 10)


def test_others_do_not_wait_and_neither_does_who_shares_little() -> None:
    bench = Bench(budget=256)
    seqs = [bench.add("a", PROMPT), bench.add("b", PROMPT[:8] + [5] * 10), bench.add("c", [9] * 20)]
    seqs.append(bench.add("root", PROMPT, root=b"another tenant"))
    bench.step()
    assert {row[0] for row in bench.runner.batches[0]} == {"a", "b", "c", "root"}
    bench.finish(*seqs)


def test_who_waits_goes_on_when_the_other_is_cancelled_or_gives_way() -> None:
    bench = Bench(budget=16)
    first, second = bench.add("a", PROMPT), bench.add("b", PROMPT)
    bench.step()
    bench.engine.cancel("a")
    bench.finish(second)
    assert second.cached_tokens == 16
    del first


def test_without_a_cache_nobody_waits() -> None:
    bench = Bench(budget=256, prefix_cache=False)
    seqs = [bench.add("a", PROMPT), bench.add("b", PROMPT)]
    bench.step()
    assert {row[0] for row in bench.runner.batches[0]} == {"a", "b"}
    bench.finish(*seqs)


def test_who_must_compute_its_whole_prompt_does_not_wait() -> None:
    bench = Bench(budget=256)
    bench.add("a", PROMPT)
    scored = make_seq("b", PROMPT, 3)
    scored.sampling = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    bench.engine.add(scored)
    bench.step()
    assert {row[0] for row in bench.runner.batches[0]} == {"a", "b"}
    bench.finish()


def test_prompts_that_are_only_to_be_handed_over_are_computed_once_too() -> None:
    bench = Bench(budget=256)
    seqs = [bench.add(name, PROMPT, prefill_only=True) for name in "ab"]
    for seq in seqs:
        bench.engine.open_cached(seq)
    while any(seq.pending for seq in seqs):
        bench.step()
    assert (bench.computed("a"), bench.computed("b")) == (40, 0)
    for seq in seqs:
        bench.engine.release(seq)
    bench.finish()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=8),
    st.sampled_from([8, 24, 128]),
    st.integers(20, 60),
)
def test_everyone_ends_with_the_right_tokens(asked: list[tuple[int, int, int]], budget: int, pages: int) -> None:
    bench, seqs = Bench(pages=pages, budget=budget), []
    for number, (common, own, steps) in enumerate(asked):
        seqs.append(bench.add(str(number), PROMPT[:common] + [number + 1] * own))
        for _ in range(steps):
            if bench.engine.has_work():
                bench.step()
    bench.finish(*seqs)
