from __future__ import annotations

from collections.abc import Iterable

import pytest

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Batch, Sampled, Seq, SeqState
from tandem.errors import ContextTooLong
from tandem.testing.engine import FakePool, FakeRunner, make_seq, naive_continuation
from tandem.types import FinishReason, SamplingParams, TokenLogprob


def make(pages: int = 64, page_size: int = 4, **limits: float) -> tuple[Engine, FakePool, FakeRunner]:
    pool = FakePool(pages, page_size)
    runner = FakeRunner(pool)
    return Engine(runner, pool, EngineConfig(**limits)), pool, runner  # type: ignore[arg-type]


def run(engine: Engine, seqs: Iterable[Seq] = ()) -> list[StepOutput]:
    """Adds, then steps until nothing is left."""
    for seq in seqs:
        engine.add(seq)
    outputs = []
    while engine.has_work():
        outputs.append(engine.step())
        engine.check_integrity()
        assert outputs[-1].advanced
    return outputs


def output_of(seq: Seq) -> list[int]:
    return seq.tokens[seq.prompt_len :]


def expected(seq: Seq) -> list[int]:
    return naive_continuation(seq.tokens[: seq.prompt_len], seq.sampling, seq.eos_ids)


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def common(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_cached_is_computed(page_size: int) -> None:
    engine, pool, _ = make(256 // page_size, page_size)
    prompt = PROMPT * 6
    done: list[list[int]] = []
    for index, tokens in enumerate([prompt, prompt, [*prompt[:37], 8, 8], [*prompt, 1, 2]]):
        seq = make_seq(f"s{index}", tokens)
        run(engine, [seq])
        assert output_of(seq) == expected(seq)
        assert seq.cached_tokens == min(len(tokens) - 1, max((common(tokens, other) for other in done), default=0))
        done.append(seq.tokens[: (len(seq.tokens) - 1) // page_size * page_size])
    assert engine.idle_leaks() == []
    assert bool(pool.copies) == (page_size > 1)


def test_generated_tokens_are_reused_up_to_the_last_that_has_kv() -> None:
    engine, _, _ = make(page_size=1)
    first = make_seq("first", PROMPT, max_tokens=6)
    run(engine, [first])
    assert engine.match_len(first.root, first.tokens) == len(first.tokens) - 1
    second = make_seq("second", [*first.tokens, 7])
    run(engine, [second])
    assert second.cached_tokens == len(first.tokens) - 1
    assert output_of(second) == expected(second)


@pytest.mark.parametrize("budget", [1, 3, 4, 7, 100])
def test_chunked_is_whole(budget: int) -> None:
    engine, _, runner = make(max_batch_tokens=budget)
    seqs = [make_seq("a", PROMPT), make_seq("b", PROMPT[3:])]
    outputs = run(engine, seqs)
    assert [output_of(seq) for seq in seqs] == [expected(seq) for seq in seqs]
    assert max(output.batch_tokens for output in outputs) <= budget
    computed = sum(count for rows in runner.batches for _, _, count in rows)
    assert sum(output.batch_tokens for output in outputs) == computed


def test_without_cache_nothing_outlives_its_sequence() -> None:
    engine, _, _ = make(prefix_cache=False)
    seqs = [make_seq("a", PROMPT), make_seq("b", PROMPT)]
    run(engine, seqs[:1])
    run(engine, seqs[1:])
    assert [output_of(seq) for seq in seqs] == [expected(seq) for seq in seqs]
    assert (seqs[1].cached_tokens, engine.status().cached_pages, engine.status().free_pages) == (0, 0, 64)
    assert engine.idle_leaks() == []
    assert engine.drain_events() == []


def test_roots_never_share() -> None:
    engine, _, _ = make()
    run(engine, [make_seq("a", PROMPT, root=b"tenant a")])
    other = make_seq("b", PROMPT, root=b"tenant b")
    run(engine, [other])
    assert other.cached_tokens == 0
    assert engine.match_len(b"tenant c", PROMPT) == 0


def test_outputs_carry_index_finish_and_logprobs() -> None:
    engine, _, _ = make()
    seq = make_seq("a", PROMPT, sampling=SamplingParams(temperature=0, max_tokens=3, logprobs=0))
    made = [output for step in run(engine, [seq]) for output in step.outputs]
    assert [output.first_index for output in made] == [0, 1, 2]
    assert [token for output in made for token in output.tokens] == output_of(seq) == expected(seq)
    assert [output.finish for output in made] == [None, None, FinishReason.LENGTH]
    assert [output.logprobs for output in made] == [(TokenLogprob(token, -0.5),) for token in output_of(seq)]
    assert (seq.state, seq.finish) == (SeqState.FINISHED, FinishReason.LENGTH)


def test_a_stop_token_ends_the_sequence() -> None:
    engine, _, _ = make()
    sampling = SamplingParams(temperature=0, max_tokens=20)
    stop = naive_continuation(PROMPT, sampling)[4]
    seq = make_seq("a", PROMPT, sampling=sampling, eos_ids=frozenset({stop}))
    last = run(engine, [seq])[-1].outputs[0]
    assert output_of(seq) == expected(seq)
    assert output_of(seq)[-1] == stop
    assert (last.finish, last.stop_token) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("budget", [4, 100])
def test_prompt_logprobs_compute_the_whole_prompt(budget: int) -> None:
    engine, _, _ = make(max_batch_tokens=budget)
    run(engine, [make_seq("warm", PROMPT)])
    seq = make_seq("a", PROMPT, sampling=SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=2))
    run(engine, [seq])
    assert seq.cached_tokens == 0
    assert seq.prompt_logprobs == [None, *(TokenLogprob(token, -1.0) for token in PROMPT[1:])]
    assert output_of(seq) == expected(seq)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_no_output_ends_with_the_prompt_and_leaves_it_cached(logprobs: int | None) -> None:
    engine, _, _ = make(page_size=1, max_batch_tokens=4)
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=logprobs)
    seq = make_seq("a", PROMPT, sampling=sampling, eos_ids=frozenset(range(1000)))
    (last,) = [output for step in run(engine, [seq]) for output in step.outputs]
    assert (last.tokens, last.logprobs, last.finish, last.first_index) == ((), (), FinishReason.LENGTH, 0)
    assert seq.tokens == PROMPT
    assert len(seq.prompt_logprobs) == (len(PROMPT) if logprobs is not None else 0)
    assert engine.match_len(b"root", PROMPT) == len(PROMPT)
    assert engine.idle_leaks() == []


def test_prompt_logprobs_survive_retraction_in_mid_prompt() -> None:
    engine, _, runner = make(pages=53, page_size=1, max_batch_tokens=2)
    old = make_seq("old", [1, 2], max_tokens=50)
    engine.add(old)
    engine.step()
    young = make_seq("young", PROMPT * 3, sampling=SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=2))
    run(engine, [young])
    starts = [start for rows in runner.batches for name, start, _ in rows if name == "young"]
    assert starts.index(0, 1) < young.prompt_len
    assert [output_of(old), output_of(young)] == [expected(old), expected(young)]
    assert young.prompt_logprobs == [None, *(TokenLogprob(token, -1.0) for token in young.tokens[1 : young.prompt_len])]


# Cancel ---------------------------------------------------------------------------------------------------------------


def begin(engine: Engine, state: str) -> Seq:
    """A sequence brought into a state."""
    seq = make_seq("it", PROMPT * 2, max_tokens=4, prefill_only=state in ("opened", "held"))
    if state in ("aside", "reserved", "landed"):
        seq.state = SeqState.WAITING_KV
    engine.add(seq)
    if state in ("reserved", "landed"):
        assert engine.reserve(seq) is not None
    if state == "landed":
        engine.landed(seq, 0)
    if state == "opened":
        assert engine.open_cached(seq) > 0
    if state in ("mid-chunk", "decoding", "held"):
        while not (seq.computed if state == "mid-chunk" else seq.output_len == 2 or not seq.pending):
            engine.step()
    return seq


STATES = {
    "waiting": SeqState.WAITING,
    "aside": SeqState.WAITING_KV,
    "reserved": SeqState.WAITING_KV,
    "landed": SeqState.WAITING,
    "opened": SeqState.WAITING,
    "mid-chunk": SeqState.RUNNING,
    "decoding": SeqState.RUNNING,
    "held": SeqState.HELD,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("state", list(STATES))
def test_cancel_leaks_nothing_in_any_state(state: str, warm: bool) -> None:
    engine, _, _ = make(max_batch_tokens=3)
    if warm or state == "opened":
        run(engine, [make_seq("warm", PROMPT)])
    seq = begin(engine, state)
    engine.check_integrity()
    assert seq.state is STATES[state]
    engine.cancel("it")
    engine.check_integrity()
    assert (seq.state, seq.finish) == (SeqState.FINISHED, FinishReason.CANCELLED)
    assert engine.idle_leaks() == []
    assert not engine.has_work()
    engine.cancel("it")
    again = make_seq("again", PROMPT * 2)
    run(engine, [again])
    assert output_of(again) == expected(again)


def test_cancelling_keeps_what_is_computed() -> None:
    engine, _, _ = make(page_size=4, max_batch_tokens=6)
    seq = make_seq("a", PROMPT)
    engine.add(seq)
    engine.step()
    engine.cancel("a")
    assert engine.match_len(seq.root, PROMPT) == 4


def test_a_cancelled_sequence_does_not_come_back() -> None:
    engine, _, _ = make()
    seq = make_seq("a", PROMPT)
    engine.reserve(seq)
    engine.cancel("a")
    with pytest.raises(ValueError, match="cannot be reserved for: FINISHED"):
        engine.reserve(seq)
    with pytest.raises(ValueError, match="is finished"):
        engine.add(seq)


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused() -> None:
    engine, _, _ = make(pages=4, page_size=4)
    with pytest.raises(ContextTooLong, match="prompt and max_tokens are 17 tokens; this worker holds 16"):
        engine.add(make_seq("a", [1] * 10, max_tokens=7))
    fits = make_seq("b", [1] * 10, max_tokens=6)
    run(engine, [fits])
    assert output_of(fits) == expected(fits)


def test_ids_are_unique_and_prompts_not_empty() -> None:
    engine, _, _ = make()
    engine.add(make_seq("a", PROMPT))
    with pytest.raises(ValueError, match="seq_id a is taken"):
        engine.add(make_seq("a", PROMPT))
    with pytest.raises(ValueError, match="has no tokens"):
        engine.add(make_seq("b", []))


class FailingRunner:
    def launch(self, batch: Batch, after: None = None) -> None:
        raise RuntimeError("device lost")

    def collect(self, flight: None) -> list[Sampled]:
        raise AssertionError("nothing was launched")


def test_a_failed_forward_advances_nothing() -> None:
    pool = FakePool(16, 4)
    engine = Engine(FailingRunner(), pool, EngineConfig())
    seq = make_seq("a", PROMPT)
    engine.add(seq)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    engine.check_integrity()
    assert (seq.computed, seq.tokens) == (0, PROMPT)
    engine.cancel("a")
    assert engine.idle_leaks() == []


def test_status_counts() -> None:
    engine, _, _ = make(pages=32, max_batch_tokens=4, max_running=1)
    run(engine, [make_seq("warm", PROMPT, max_tokens=1)])
    engine.add(make_seq("a", [*PROMPT[:8], 7, 7, 7, 7, 7, 7], max_tokens=4))
    engine.add(make_seq("b", [9] * 10))
    engine.reserve(make_seq("c", [9] * 8))
    engine.step()
    status = engine.status()
    assert (status.running, status.waiting, status.held) == (1, 2, 0)
    assert status.queued_tokens == 2 + 10
    assert (status.total_pages, status.cached_pages) == (32, 3)
    # Four pages of a (two shared, two its own) and two of c.
    assert status.free_pages == 32 - 4 - 2
    assert (status.matched_tokens, status.prompt_tokens) == (8, 11 + 14 + 8)


def test_leaks_are_named() -> None:
    engine, _, _ = make()
    engine.add(make_seq("a", PROMPT))
    engine.step()
    assert engine.idle_leaks() == [
        "sequence a is RUNNING",
        "3 pages are used and 2 cached in layer group 0",
        "1 cache handles are held",
    ]
