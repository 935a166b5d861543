"""What a step returns besides tokens: log-probabilities of outputs and prompts, and nothing where nothing was asked."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.runner import LOGIT_ROWS, Runner
from tandem.engine.sequence import Batch, Row
from tandem.kv import Span
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = [(7 * i * i + 3) % 280 for i in range(LOGIT_ROWS + 37)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    spec = CheckpointSpec(layers=2, vocab=280, max_positions=512)
    return load_model(make_checkpoint(tmp_path_factory.mktemp("model"), spec), "auto", CPU)


@pytest.mark.parametrize("chunk", [16, LOGIT_ROWS + 9, 1000])
def test_prompt_logprobs_are_those_of_the_whole_prompt(chunk: int, loaded: LoadedModel) -> None:
    loop = RunnerLoop(loaded)
    other = loop.add(PROMPT[5:30], GREEDY)
    seq = loop.add(PROMPT, replace(GREEDY, prompt_logprobs=2, logprobs=1))
    loop.step([other], 1000)
    loop.finish([other, seq], chunk)
    expected = loop.logits(seq.tokens[:-1]).log_softmax(-1)
    assert len(seq.prompt_logprobs) == len(PROMPT) - 1
    assert len(seq.output_logprobs) == 8
    for position, found in enumerate([*seq.prompt_logprobs, *seq.output_logprobs]):
        assert found is not None
        assert found.token == seq.tokens[position + 1]
        assert found.logprob == pytest.approx(float(expected[position, found.token]), abs=1e-4)
        assert found.top[0][1] == pytest.approx(float(expected[position].max()), abs=1e-4)
        assert len(found.top) == (2 if position < len(PROMPT) - 1 else 1)
    assert other.prompt_logprobs == []
    first, seq.computed, seq.prompt_logprobs = seq.prompt_logprobs, 0, []
    loop.step([seq], 1000)  # computed anew, its output now among the tokens: those are no prompt
    assert [found.token for found in seq.prompt_logprobs if found] == [found.token for found in first if found]


def test_rows_that_do_not_sample_return_nothing_and_no_sequence_is_touched(loaded: LoadedModel) -> None:
    loop = RunnerLoop(loaded)
    first, second = loop.add(PROMPT[:20], GREEDY), loop.add(PROMPT[:9], replace(GREEDY, logprobs=0))
    before = copy.deepcopy((first.tokens, first.pages, first.computed, second.tokens, second.pages, second.computed))
    results = loop.runner.run(Batch((Row(first, 0, 12, samples=False), Row(second, 0, 9, samples=True))))
    assert before == (first.tokens, first.pages, first.computed, second.tokens, second.pages, second.computed)
    assert results[0].token is None
    assert results[0].logprob is None
    assert results[1].token is not None
    assert results[1].logprob is not None
    assert results[1].logprob.top == ()


def test_a_seeded_request_draws_the_same_alone_in_company_and_after_starting_over(loaded: LoadedModel) -> None:
    params = SamplingParams(seed=77, temperature=1.2, top_p=0.95, max_tokens=12)
    alone = RunnerLoop(loaded)
    (expected,) = alone.finish([alone.add(PROMPT, params)])
    loop = RunnerLoop(loaded, page_size=4)
    seq = loop.add(PROMPT, params)
    company = [loop.add(PROMPT[i:], replace(params, seed=i, max_tokens=30)) for i in range(4)]
    loop.step(company, 20)
    while seq.output_len < 5:
        loop.step([seq, *company], 33)
    seq.computed = 0  # its pages were taken from it; prompt and output are computed anew
    assert loop.finish([seq], 19) == [expected]
    choices = [alone.add(PROMPT, params, choice=index) for index in range(2)]
    outputs = alone.finish(choices)
    assert outputs[0] == expected
    assert outputs[1] != expected


@pytest.mark.parametrize("sizes", [(16, 1), (1, 64), (64, 16)])
def test_a_sequence_goes_on_elsewhere_from_its_exported_kv(sizes: tuple[int, int], loaded: LoadedModel) -> None:
    source, target = (RunnerLoop(loaded, size, num_pages=1024 // size, seed=size) for size in sizes)
    first, second = source.add(PROMPT, GREEDY), target.add(PROMPT, GREEDY)
    source.step([first], len(PROMPT) - 1)
    for start in range(0, len(PROMPT) - 1, 40):
        span = Span(start, min(40, len(PROMPT) - 1 - start))
        data = bytearray(loaded.layout.span_bytes(span, len(PROMPT) - 1))
        source.pool.gather(first.pages, span, len(PROMPT) - 1, memoryview(data))
        target.pool.scatter(second.pages, span, len(PROMPT) - 1, memoryview(data))
    second.computed = len(PROMPT) - 1
    assert target.finish([second]) == source.finish([first])


def test_ids_behind_the_vocabulary_are_never_sampled(loaded: LoadedModel) -> None:
    pool = KvPool(loaded.layout, 8, 16, CPU)
    seq = RunnerLoop(loaded).add(PROMPT[:20], replace(GREEDY, logprobs=20))
    seq.pages = [[0, 1]]
    (whole,) = Runner(loaded.module, pool, 280, CPU).run(Batch((Row(seq, 0, 20, samples=True),)))
    assert whole.token is not None
    (cut,) = Runner(loaded.module, pool, whole.token, CPU).run(Batch((Row(seq, 0, 20, samples=True),)))
    assert cut.token is not None
    assert cut.logprob is not None
    assert max(cut.token, *(token for token, _ in cut.logprob.top)) < whole.token
