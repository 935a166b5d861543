"""Overlapping steps of real models: future tokens reach the model, whatever computes it, and outputs are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.sequence import Seq
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.engine import make_seq
from tandem.testing.graphs import FakeCapture
from tandem.types import SamplingParams, TokenLogprob

PROMPTS = [[(5 * i * i + 7 * seed) % 280 for i in range(9 + 17 * seed)] for seed in range(4)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
KINDS = (
    GREEDY,
    SamplingParams(seed=5, temperature=1.3, max_tokens=14),
    SamplingParams(seed=6, temperature=0.9, top_p=0.9, top_k=40, min_tokens=6, logprobs=2, max_tokens=11),
    replace(GREEDY, prompt_logprobs=1, logit_bias=((9, 3.0),)),
    replace(GREEDY, frequency_penalty=0.8, max_tokens=5),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CheckpointSpec(layers=2, vocab=280))


def outputs(model: Path, kinds: tuple[SamplingParams, ...], **values: Any) -> tuple[list[Any], int]:
    """What every sequence got, and how many future tokens there were."""
    settings = {"dtype": "float32", "max_batch_tokens": 40, "pages": 64, **values}
    engine, _ = build_engine(WorkerConfig.model_validate({"model": str(model), **settings}))
    futures, launch = [0], vars(engine)["_runner"].launch

    def counted(batch: Any, after: Any = None) -> Any:
        futures[0] += sum(row.future for row in batch.rows)
        return launch(batch, after)

    vars(engine)["_runner"].launch = counted
    seqs = [make_seq(f"s{n}", PROMPTS[n % 4], sampling=kind, choice=n) for n, kind in enumerate(kinds)]
    late = seqs.pop()
    for seq in seqs:
        engine.add(seq)
    for _ in range(3):
        engine.step()
    engine.add(late)
    while engine.has_work():
        engine.step()
    engine.check_integrity()
    assert engine.idle_leaks() == []
    return [told(seq) for seq in [*seqs, late]], futures[0]


def told(seq: Seq) -> Any:
    def rounded(scores: list[Any]) -> list[Any]:
        return [(s.token, round(s.logprob, 4)) if isinstance(s, TokenLogprob) else None for s in scores]

    return seq.tokens, seq.finish, rounded(seq.output_logprobs), rounded(seq.prompt_logprobs)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_model_says_the_same_one_step_at_a_time_and_overlapping(model: Path, kernels: str) -> None:
    expected, none = outputs(model, KINDS, kernels=kernels)
    found, futures = outputs(model, KINDS, kernels=kernels, overlap="on")
    assert found == expected
    assert (none, futures > 10) == (0, True)
    assert len({tuple(tokens[-4:]) for tokens, *_ in expected}) == len(KINDS)


def test_replayed_graphs_take_future_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads its inputs where it was captured: what was sampled is copied there without passing the host."""
    pytest.importorskip("tandem.engine.graphs", reason="triton is not installed")
    few, capture = (replace(GREEDY, max_tokens=5), replace(GREEDY, max_tokens=7)), FakeCapture()
    expected, _ = outputs(model, few, kernels="torch")
    monkeypatch.setattr("tandem.engine.kernels.choose_gpu.CudaCapture", lambda device: capture)
    graphs = replace(choose_kernels("triton", torch.device("cpu")), graph_rows=2)
    monkeypatch.setattr("tandem.engine.build.choose_kernels", lambda *about: graphs)
    found, futures = outputs(model, few, overlap="on")
    assert found == expected
    assert futures >= 6
    assert capture.launched >= futures // 2
