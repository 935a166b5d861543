"""Every family and option against transformers in float32: logits at every position, and greedy tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.engine.kernels.choose import Kernels, choose_kernels
from tandem.engine.model import LoadedModel, load_model
from tandem.errors import ConfigError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint, make_model
from tandem.testing.families import ROPES, VARIANTS
from tandem.testing.reference import Reference
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CPU = torch.device("cpu")
SMALL = VARIANTS["llama"]


def prompts_of(spec: CheckpointSpec, *lengths: int) -> list[list[int]]:
    source = random.Random(spec.seed)
    return [[source.randrange(spec.vocab) for _ in range(length)] for length in lengths]


def load(path: Path, spec: CheckpointSpec, kernels: Kernels | None = None) -> LoadedModel:
    return load_model(make_checkpoint(path, spec), spec.dtype, CPU, kernels)


@pytest.fixture(scope="module", params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return choose_kernels(request.param, CPU)
    except ConfigError as error:
        pytest.skip(str(error))


def lengths_of(spec: CheckpointSpec) -> tuple[int, int, int]:
    """Around pages and windows; where transformers would change its LongRoPE divisors, only behind that."""
    original = spec.config.get("original_max_position_embeddings", 0)
    return (150, 77, 65) if 0 < original < spec.max_positions else (150, 1, 33)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, kernels: Kernels, tmp_path: Path) -> None:
    spec = VARIANTS[name]
    model, loop = make_model(spec), RunnerLoop(load(tmp_path, spec, kernels))
    prompts, reference = prompts_of(spec, *lengths_of(spec)), Reference(model)
    for prompt in prompts:
        torch.testing.assert_close(loop.logits(prompt), reference.logits(prompt), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(loop.logits(prompts[0], chunk=41), reference.logits(prompts[0]), atol=2e-4, rtol=1e-4)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3)
    seqs = [loop.add(prompt, greedy) for prompt in prompts]
    for prompt, seq, output in zip(prompts, seqs, loop.finish(seqs), strict=True):
        verdict = reference.judge(prompt, output, seq.output_logprobs)
        assert verdict.agrees
        assert verdict.near_ties < 3


def test_dynamic_ntk_beyond_the_first_context_is_what_a_step_by_step_decode_has(tmp_path: Path) -> None:
    spec = replace(SMALL, max_positions=32, config={"rope_parameters": ROPES["dynamic"]})
    model, loop = make_model(spec), RunnerLoop(load(tmp_path, spec))
    (tokens,) = prompts_of(spec, 80)
    cache, expected = None, []
    for token in tokens:
        with torch.inference_mode():
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(out.logits[0, 0])
    whole = loop.logits(tokens)
    torch.testing.assert_close(whole, torch.stack(expected), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(whole, loop.logits(tokens, chunk=7), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk", [5, 64])
def test_pages_chunks_and_company_do_not_change_a_token(page_size: int, chunk: int, tmp_path: Path) -> None:
    spec = replace(SMALL, family="qwen2", seed=page_size)
    loaded = load(tmp_path, spec)
    prompts = prompts_of(spec, 90, 3, 41, 64, 65, 128, 17)
    greedy = SamplingParams(temperature=0.0, max_tokens=10)
    alone = RunnerLoop(loaded)
    expected = [alone.finish([alone.add(prompt, greedy)])[0] for prompt in prompts]
    loop = RunnerLoop(loaded, page_size, num_pages=1024 // page_size, seed=3)
    seqs = [loop.add(prompt, greedy) for prompt in prompts]
    for started in range(1, len(seqs) + 1):
        loop.step([seq for seq in seqs[:started] if seq.output_len < 10], chunk)
    assert loop.finish(seqs, chunk) == expected
