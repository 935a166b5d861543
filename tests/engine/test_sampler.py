"""The vectorised sampler against one that is written out token by token, and what must not change a draw."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine import sampler
from tandem.engine.philox import uniforms
from tandem.engine.sampler import Filters, draw
from tandem.engine.sequence import Picked, Seq
from tandem.types import SamplingParams

VOCAB = 50
EOS = frozenset({2, 7})


def seq_of(params: SamplingParams, prompt: list[int], output: list[int], choice: int = 0) -> Seq:
    return Seq("s", prompt + output, len(prompt), params, b"", EOS, choice=choice)


def sample(logits: torch.Tensor, seqs: list[Seq]) -> list[Picked]:
    return sampler.sample(logits, seqs).read()


def naive_weights(logits: list[float], seq: Seq) -> list[float]:
    """Adjusted logits, then what is kept of the distribution, each token in turn."""
    params, output = seq.sampling, seq.tokens[seq.prompt_len :]
    adjusted = list(logits)
    for token in range(len(logits)):
        if token in seq.tokens:
            factor = params.repetition_penalty
            adjusted[token] = adjusted[token] / factor if adjusted[token] > 0 else adjusted[token] * factor
        count = output.count(token)
        adjusted[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        adjusted[token] += dict(params.logit_bias).get(token, 0.0)
        if token in seq.eos_ids and len(output) < params.min_tokens:
            adjusted[token] = -math.inf
    if params.greedy:
        return [float(token == max(range(len(adjusted)), key=adjusted.__getitem__)) for token in range(len(adjusted))]
    scaled = [value / params.temperature for value in adjusted]
    ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = ranked[: params.top_k or len(ranked)]
    weight = {token: math.exp(scaled[token] - scaled[ranked[0]]) for token in kept}
    total, before, nucleus = sum(weight.values()), 0.0, set()
    for token in kept:
        if before < params.top_p:
            nucleus.add(token)
        before += weight[token] / total
    return [weight[t] if t in nucleus and weight[t] >= params.min_p else 0.0 for t in range(len(scaled))]


def naive_token(logits: list[float], seq: Seq) -> int:
    """The token at which the cumulative weight passes the sequence's uniform number."""
    weights = naive_weights(logits, seq)
    one = [np.array([value], dtype=np.uint64) for value in (seq.sampling.seed, seq.output_len, seq.choice)]
    left = float(uniforms(one[0], one[1], one[2])[0]) * sum(weights)
    for token, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return token
    raise AssertionError("the weights sum to less than was drawn")


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 0.3, 1.0, 1.7)),
    top_p=st.sampled_from((1.0, 0.93, 0.5, 0.01)),
    top_k=st.sampled_from((0, 1, 3, 17, 1000)),
    min_p=st.sampled_from((0.0, 0.03, 0.4)),
    frequency_penalty=st.sampled_from((0.0, 0.7, -1.1)),
    presence_penalty=st.sampled_from((0.0, 1.3, -0.4)),
    repetition_penalty=st.sampled_from((1.0, 1.6, 0.7)),
    logit_bias=st.sampled_from(((), ((3, 4.5), (2, -100.0)), ((0, -3.0),))),
    seed=st.integers(0, (1 << 64) - 1),
    max_tokens=st.just(64),
    min_tokens=st.sampled_from((0, 0, 5)),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
SEQS = st.builds(seq_of, PARAMS, TOKENS.filter(bool), TOKENS, st.integers(0, 127))


@given(seqs=st.lists(SEQS, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_every_row_is_what_the_written_out_sampler_draws(seqs: list[Seq], seed: int) -> None:
    # The values of a row are a step apart, so that no filter's edge is a matter of rounding.
    order = random.Random(seed)
    rows = [[0.173 * value - 3.1 for value in order.sample(range(VOCAB), VOCAB)] for _ in seqs]
    drawn = [token for token, _ in sample(torch.tensor(rows), seqs)]
    assert drawn == [naive_token(row, seq) for row, seq in zip(rows, seqs, strict=True)]


def distribution(params: SamplingParams, logits: list[float], draws: int, choice: bool = False) -> Counter[int]:
    """Tokens drawn at `draws` positions of one sequence, or by as many choices at one position."""
    length = 0 if choice else 1
    seqs = [seq_of(params, [1], [0] * (i * length), choice=i * (1 - length)) for i in range(draws)]
    drawn = sample(torch.tensor([logits]).expand(draws, -1), seqs)
    return Counter(token for token, _ in drawn if token is not None)


@pytest.mark.parametrize("by_choice", [False, True])
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(seed=1), {0, 1, 2, 3, 4, 5}),
        (SamplingParams(seed=2, temperature=0.5), {0, 1, 2, 3, 4, 5}),
        (SamplingParams(seed=3, top_k=3), {0, 2, 4}),
        (SamplingParams(seed=4, top_p=0.6), {0, 4}),
        (SamplingParams(seed=5, min_p=0.4), {0, 4}),
    ],
)
def test_positions_and_choices_draw_as_distributed(params: SamplingParams, kept: set[int], by_choice: bool) -> None:
    logits, draws = [2.0, -0.5, 0.9, 0.3, 1.7, 0.1], 4000
    counts = distribution(params, logits, draws, by_choice)
    weights = {token: math.exp(logits[token] / params.temperature) for token in kept}
    expected = {token: draws * weight / sum(weights.values()) for token, weight in weights.items()}
    assert set(counts) <= kept
    statistic = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in kept)
    assert statistic < 26.0, "chi-square of at most 5 degrees of freedom, exceeded by chance once in 10,000"


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1), (1.0 - 2.0**-53, 4)])
def test_the_ends_of_the_noise_fall_on_tokens_that_are_kept(noise: float, expected: int) -> None:
    logits = torch.tensor([[-9.0, 1.0, -9.0, -9.0, 1.0, -9.0]]) * torch.linspace(0.9, 1.1, 500)[:, None]
    rows = len(logits)
    keep_two = Filters(
        torch.ones(rows), torch.full((rows,), 2), torch.ones(rows).double(), torch.zeros(rows), 2, False, False
    )
    drawn = draw(logits, keep_two, torch.full((rows,), noise, dtype=torch.float64))
    assert set(drawn.tolist()) == {expected}


def test_a_draw_does_not_depend_on_the_batch_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 400, generator=generator) * 3
    kinds = [
        SamplingParams(seed=9),
        SamplingParams(seed=9, top_p=0.9),
        SamplingParams(seed=9, top_k=20, temperature=1.4),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=9, frequency_penalty=1.0, logprobs=2),
        SamplingParams(seed=9, min_p=0.1),
    ]
    seqs = [seq_of(kinds[row % 6], [1, 2], list(range(row)), choice=row % 3) for row in range(12)]
    together = sample(logits, seqs)
    order = random.Random(1).sample(range(12), 12)
    assert [sample(logits[row : row + 1], [seqs[row]])[0][0] for row in range(12)] == [token for token, _ in together]
    shuffled = sample(logits[order], [seqs[row] for row in order])
    assert [token for token, _ in shuffled] == [together[row][0] for row in order]


def test_a_nucleus_wider_than_the_first_candidates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(2)) * 0.1
    seqs = [seq_of(SamplingParams(seed=3, top_p=0.8 if row % 2 else 0.01), [1], [0] * row) for row in range(40)]
    expected = [token for token, _ in sample(logits, seqs)]
    monkeypatch.setattr(sampler, "TOP_CANDIDATES", 8)
    assert [token for token, _ in sample(logits, seqs)] == expected


def test_equal_logits_at_the_edge_are_all_kept() -> None:
    counts = distribution(SamplingParams(seed=1, top_k=2), [1.0, 1.0, 1.0, 0.0], 300)
    assert set(counts) == {0, 1, 2}


def test_the_input_is_left_as_it_was_and_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    before = logits.clone()
    base = SamplingParams(temperature=0.0, logprobs=3)
    twisted = replace(base, temperature=2.0, repetition_penalty=5.0, logit_bias=((5, 100.0),), logprobs=0)
    seqs = [seq_of(base, [1], []), seq_of(twisted, [1], [5, 5]), seq_of(replace(base, logprobs=None), [1], [])]
    results = sample(logits, seqs)
    assert torch.equal(logits, before)
    expected = before.double().log_softmax(-1)
    for row, count in ((0, 3), (1, 0)):
        token, logprob = results[row]
        assert logprob is not None
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        best = expected[row].topk(count)
        assert [item[0] for item in logprob.top] == best.indices.tolist()
        assert [item[1] for item in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert results[1][0] == 5
    assert results[2][1] is None


def test_ends_are_hidden_until_the_least_number_of_tokens() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, 2], logits[0, 7], logits[0, 9] = 9.0, 8.0, 1.0
    params = SamplingParams(temperature=0.0, min_tokens=2, max_tokens=9)
    assert [sample(logits, [seq_of(params, [1], [0] * n)])[0][0] for n in range(4)] == [9, 9, 2, 2]


def test_ids_outside_the_vocabulary_do_nothing() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32)[None]
    params = SamplingParams(temperature=0.0, min_tokens=2, logit_bias=((VOCAB, 99.0), (3, 60.0), (-1, -99.0)))
    seq = seq_of(params, [1], [])
    seq.eos_ids = frozenset({VOCAB + 5, 3})
    assert sample(logits, [seq])[0][0] == VOCAB - 1
    seq.tokens += [4, 4]
    assert sample(logits, [seq])[0][0] == 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=5e-324, top_p=0.9),
        SamplingParams(temperature=1e-40, top_k=2, min_p=0.5),
        SamplingParams(repetition_penalty=1e-40),
        SamplingParams(repetition_penalty=5e-324, frequency_penalty=-2.0),
    ],
)
def test_the_smallest_divisors_draw_one_of_the_best(params: SamplingParams) -> None:
    logits = torch.tensor([[1.0, 30.0, -4.0, 20.0, 2.0]])
    for choice in range(20):
        ((token, _),) = sample(logits, [Seq("s", [1, 2, 3], 1, params, b"", frozenset(), choice=choice)])
        assert token in (1, 3) if params.repetition_penalty < 1.0 else token == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_yields_no_token_and_harms_no_other(value: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, logprobs=1)
    seqs = [seq_of(params, [1], []), seq_of(params, [2], [])]
    good = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    broken = good.clone()
    broken[0, 7] = value
    alone = sample(good, seqs[:1])
    assert sample(torch.cat([good, broken]), seqs) == [alone[0], (None, None)]
