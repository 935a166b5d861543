"""Answers of workers whose attention is FlashInfer's, by its stand-in: bfloat16, so that the reference is met nearly.

FlashInfer serves no float32, which `test_equality` asks for, and no heads as small as those of its models.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tandem.engine.attention.flashinfer import FlashInferAttention
from tandem.engine.kernels.choose import Kernels
from tandem.engine.kernels.choose_gpu import UNMEASURED
from tandem.engine.kernels.ops import TorchOps
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.flashinfer import FakeFlashInfer
from tandem.testing.pair import pair
from tandem.testing.reference import Reference
from tandem.types import SamplingParams

SPEC = CheckpointSpec(
    layers=2, hidden=128, heads=2, kv_heads=1, head_dim=64, vocab=300, max_positions=512, dtype="bfloat16", std=0.1
)
LENGTHS = (1, 15, 16, 17, 40, 70)
REGRET = 0.12
"""How far the reference's logit of a token may lie behind its best: a few units of bfloat16's last place."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)


def regret(reference: Reference, prompt: list[int], tokens: list[int]) -> float:
    """The largest, over an answer's steps."""
    logits = reference.logits((*prompt, *tokens[:-1]))[len(prompt) - 1 :]
    return max(float(row.max() - row[token]) for row, token in zip(logits, tokens, strict=True))


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(("prefill", "page", "budget"), [(0, 1, 512), (1, 16, 24), (1, 64, 512)])
async def test_answers_are_nearly_the_references(
    prefill: int, page: int, budget: int, overlap: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeFlashInfer()
    kernels = Kernels("flashinfer", UNMEASURED, TorchOps(), backend=lambda pool: FlashInferAttention(pool, library))
    monkeypatch.setattr("tandem.engine.build.choose_kernels", lambda *about: kernels)
    source, reference = random.Random(3), Reference.load(model)
    prompts = [[source.randrange(6, 300) for _ in range(length)] for length in LENGTHS]
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    async with pair(model, prefill=prefill, page_size=page, max_batch_tokens=budget, overlap=overlap) as workers:
        names = [await workers.submit(prompt, sampling) for prompt in prompts]
        answers = [(await workers.answer(name))[0].tokens for name in names]
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == 6
        assert regret(reference, prompt, tokens) <= REGRET
    assert len({tuple(tokens) for tokens in answers}) == len(prompts)
    assert {plan.wrapper for plan in library.plans} == {"decode", "prefill"}
