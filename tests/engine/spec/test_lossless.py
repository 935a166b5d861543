"""Speculation changes no token and no probability, whatever a request asks for."""

from __future__ import annotations

import gc
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar

from tandem.config import DecodeConfig
from tandem.demo import MODEL_PATH
from tandem.demo.corpus import copying, held_out
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.grammar.constraint import GrammarConstraint, Vocabulary
from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.engine.sequence import Seq
from tandem.engine.spec.speculation import Speculation
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.drafter import GuessingDrafter
from tandem.testing.engine import make_seq
from tandem.text.tokenizer import Tokenizer
from tandem.types import SamplingParams

VOCAB = 300
PROMPTS = [[(17 * at * (row + 2)) % (VOCAB - 10) + 6 for at in range(9 + 14 * row)] for row in range(4)]
WISHES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=30, logprobs=3),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7, max_tokens=30, logprobs=0),
    "penalised": SamplingParams(
        temperature=0.7, seed=3, max_tokens=30, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3
    ),
    "biased": SamplingParams(temperature=0.8, seed=5, max_tokens=30, logit_bias=((9, 3.0), (11, -100.0)), min_p=0.05),
    "late": SamplingParams(temperature=1.0, seed=9, max_tokens=30, min_tokens=12),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CheckpointSpec(layers=2, vocab=VOCAB))


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """An engine's thread for masks ends with the engine, which is part of cycles."""
    yield
    gc.collect()


def build(model: Path, **settings: Any) -> Engine:
    given = {"model": str(model), "dtype": "float32", "kv_mib": 16, "draft_adaptive": False, **settings}
    return build_engine(DecodeConfig.model_validate(given))[0]


def guided(model: Path, outputs: dict[str, list[int]], trees: bool, vocab: int = VOCAB, **settings: Any) -> Engine:
    """An engine whose drafts are the right answers with errors in them."""
    engine = build(model, **settings)
    drafter = GuessingDrafter(lambda seq: outputs[seq.seq_id], vocab, trees)
    engine.speculation = Speculation(drafter, engine.memory, 6, adaptive=False)
    engine.memory.on_close = engine.speculation.forget
    return engine


def run(engine: Engine, seqs: list[Seq]) -> dict[str, list[int]]:
    for seq in seqs:
        engine.add(seq)
    while engine.has_work():
        engine.step()
    engine.check_integrity()
    assert engine.idle_leaks() == []
    return {seq.seq_id: seq.tokens[seq.prompt_len :] for seq in seqs}


def asked(sampling: SamplingParams, eos: frozenset[int] = frozenset({20, 21, 22, 23, 24})) -> list[Seq]:
    """Each prompt for two choices."""
    return [
        make_seq(f"{row}-{choice}", prompt, sampling=sampling, eos_ids=eos, choice=choice)
        for row, prompt in enumerate(PROMPTS)
        for choice in range(2)
    ]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("trees", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("wish", WISHES)
def test_every_wish_is_met_as_without(wish: str, trees: bool, kernels: str, checkpoint: Path) -> None:
    plain, sampling = asked(WISHES[wish]), WISHES[wish]
    outputs = run(build(checkpoint, kernels=kernels), plain)
    drafted = asked(sampling)
    engine = guided(checkpoint, outputs, trees, kernels=kernels, page_size=4)
    assert run(engine, drafted) == outputs
    assert engine.speculation is not None and engine.speculation.accepted > 20
    for one, other in zip(plain, drafted, strict=True):
        assert (one.finish, one.stop_token) == (other.finish, other.stop_token)
        for left, right in zip(one.output_logprobs, other.output_logprobs, strict=True):
            assert (left.token, [token for token, _ in left.top]) == (right.token, [token for token, _ in right.top])
            assert left.logprob == pytest.approx(right.logprob, abs=1e-3)
        assert len(other.output_logprobs) in (0, other.output_len)


def test_the_distribution_is_the_models(checkpoint: Path) -> None:
    """Two tokens, of three candidates each, against their exact probabilities (chi-square, 8 degrees of freedom)."""
    count, prompt = 1500, PROMPTS[1]
    sampling = SamplingParams(temperature=0.8, top_k=3, max_tokens=3, logprobs=3)
    engine = build(checkpoint)

    def candidates(tokens: list[int]) -> dict[int, float]:
        seq = make_seq(f"asks-{len(engine.seqs)}-{tokens[-1]}", tokens, sampling=replace(sampling, max_tokens=1))
        run(engine, [seq])
        weights = {token: torch.tensor(value / 0.8).exp().item() for token, value in seq.output_logprobs[0].top}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    expected = {
        (one, two): share * part
        for one, share in candidates(prompt).items()
        for two, part in candidates([*prompt, one]).items()
    }
    likeliest = max(expected, key=lambda pair: expected[pair])
    answers = {str(number): [*likeliest, 7] for number in range(-1, count)}
    drafted = guided(checkpoint, answers, trees=False, page_size=1)
    run(drafted, [make_seq("-1", prompt)])  # from then on the prompt is cached, and drafts are verified from the start
    seqs = [make_seq(str(seed), prompt, sampling=replace(sampling, seed=seed, logprobs=None)) for seed in range(count)]
    found = Counter((one, two) for one, two, _ in run(drafted, seqs).values())
    assert drafted.speculation is not None and drafted.speculation.accepted > count / 4
    assert set(found) <= set(expected)
    statistic = sum((found[pair] - count * share) ** 2 / (count * share) for pair, share in expected.items())
    assert statistic < 26.1  # exceeded once in a thousand


def test_five_hundred_greedy_answers_are_equal() -> None:
    tokenizer, copies = Tokenizer.load(str(MODEL_PATH)), copying(3)
    chats = [*held_out(3, 400), *itertools.islice(copies, 100)]
    prompts = [tokenizer.encode(tokenizer.render(chat.prompt())) for chat in chats]
    sampling = SamplingParams(temperature=0.0, max_tokens=12)

    def answers(engine: Engine) -> dict[str, list[int]]:
        seqs = [
            make_seq(str(number), prompt, sampling=sampling, eos_ids=frozenset({2}))
            for number, prompt in enumerate(prompts)
        ]
        return run(engine, seqs)

    drafted = build(MODEL_PATH, speculative="ngram", kv_mib=64)
    assert answers(drafted) == answers(build(MODEL_PATH, kv_mib=64))
    assert drafted.speculation is not None and drafted.speculation.accepted > 500


# Grammars -------------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a rather long fixed text", "another"]},
        "n": {"type": "integer"},
    },
    "required": ["city", "kind", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("forcing", [False, True], ids=["masks", "jump-forward"])
@pytest.mark.parametrize("trees", [False, True], ids=["chains", "trees"])
def test_grammars_are_kept_as_without(trees: bool, forcing: bool) -> None:
    tokenizer = Tokenizer.load(str(MODEL_PATH))
    info = load_vocabulary(str(MODEL_PATH), 2048, (2,))
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(json.dumps(SCHEMA))
    vocabulary = Vocabulary(info, tokenizer.encode) if forcing else None
    prompts = [tokenizer.encode(tokenizer.render(chat.prompt())) for chat in held_out(5, 6)]

    def seqs() -> list[Seq]:
        sampling = SamplingParams(temperature=0.7, seed=1, max_tokens=60, min_tokens=2)
        return [
            make_seq(
                str(number), prompt, sampling=sampling, eos_ids=frozenset({2}),
                constraint=GrammarConstraint(compiled, vocabulary, after=(4,) if number == 5 else ()),
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip

    plain, drafted = seqs(), seqs()
    outputs = run(build(MODEL_PATH), plain)
    engine = guided(MODEL_PATH, outputs, trees, vocab=2048)
    assert run(engine, drafted) == outputs
    assert [seq.finish for seq in drafted] == [seq.finish for seq in plain]
    assert engine.speculation is not None and engine.speculation.accepted > 30
    texts = [tokenizer.decode(outputs[str(number)]) for number in range(5)]
    assert any(json.loads(text)["kind"] for text in texts if text.endswith("}"))
