"""The test checkpoints are sharp: faults that a serving bug would cause change what they say.

Everything that is tested end to end on such a checkpoint rests on this. One of the customary standard deviation
(0.02) lets most of these faults pass unseen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.model.family import CausalLM
from tandem.engine.runner import Runner
from tandem.engine.sequence import Seq
from tandem.engine.taps import HiddenTaps
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

PAGE = 16
PROMPTS = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
Fault = Callable[[RunnerLoop, list[Seq]], None]


class Shifted:
    """A model whose every position is one too high."""

    def __init__(self, model: CausalLM) -> None:
        self.layout = model.layout
        self.logits = model.logits
        self.tensors = model.tensors
        self._model = model

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor | None = None,
        taps: HiddenTaps | None = None,
    ) -> torch.Tensor:
        return self._model.forward(tokens, positions + 1, plan, keep, taps)


def wrong_offset(loop: RunnerLoop, seqs: list[Seq]) -> None:
    loop.runner = Runner(Shifted(loop.runner.model), loop.pool, loop.runner.vocab_size, loop.runner.device)


def foreign_page(loop: RunnerLoop, seqs: list[Seq]) -> None:
    for seq, other in zip(seqs, [*seqs[1:], seqs[0]], strict=True):
        loop.pool.copy_tokens(0, other.pages[0][1], seq.pages[0][2], PAGE)


def swapped_heads(loop: RunnerLoop, seqs: list[Seq]) -> None:
    for plane in ("k", "v"):
        tensor = loop.pool.plane(plane, 0)
        tensor.copy_(tensor.flip(1))


def nothing(loop: RunnerLoop, seqs: list[Seq]) -> None:
    loop.runner = Runner(loop.runner.model, loop.pool, loop.runner.vocab_size, loop.runner.device)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    spec = replace(CheckpointSpec(), family=request.param)
    return load_model(make_checkpoint(tmp_path_factory.mktemp("sharp"), spec), "auto", torch.device("cpu"))


def outputs(loaded: LoadedModel, fault: Fault) -> list[list[int]]:
    """Each prompt's tokens when the fault strikes between prefill and decode."""
    source, loop = random.Random(0), RunnerLoop(loaded, PAGE, num_pages=600)
    prompts = [[source.randrange(6, 512) for _ in range(source.randrange(60, 300))] for _ in range(PROMPTS)]
    seqs = [loop.add(prompt, GREEDY) for prompt in prompts]
    for seq in seqs:
        loop.step([seq], seq.pending - 1)
    fault(loop, seqs)
    return loop.finish(seqs)


@pytest.mark.parametrize("fault", [wrong_offset, foreign_page, swapped_heads], ids=lambda fault: fault.__name__)
def test_a_fault_flips_at_least_nine_outputs_in_ten(fault: Fault, loaded: LoadedModel) -> None:
    sound = outputs(loaded, nothing)
    flipped = sum(left != right for left, right in zip(sound, outputs(loaded, fault), strict=True))
    assert flipped >= 0.9 * PROMPTS
    assert sum(len(set(output)) for output in sound) > 10 * PROMPTS, "outputs that repeat themselves say little"
