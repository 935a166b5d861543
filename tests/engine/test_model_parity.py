"""Every family and option against transformers in float32: logits at every position, and greedy tokens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.engine.model import LoadedModel, load_model
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint, make_model
from tandem.testing.families import LLAMA3, ROPES, VARIANTS
from tandem.testing.reference import Reference
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CPU = torch.device("cpu")
SMALL = VARIANTS["llama"]


def prompts_of(spec: CheckpointSpec, *lengths: int) -> list[list[int]]:
    source = random.Random(spec.seed)
    return [[source.randrange(spec.vocab) for _ in range(length)] for length in lengths]


def load(path: Path, spec: CheckpointSpec) -> LoadedModel:
    return load_model(make_checkpoint(path, spec), spec.dtype, CPU)


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float()


def lengths_of(spec: CheckpointSpec) -> tuple[int, int, int]:
    """Around pages and windows; where transformers would change its LongRoPE divisors, only behind that."""
    original = spec.config.get("original_max_position_embeddings", 0)
    return (150, 77, 65) if 0 < original < spec.max_positions else (150, 1, 33)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    spec = VARIANTS[name]
    model, loop = make_model(spec), RunnerLoop(load(tmp_path, spec))
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


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_older_spelling_of_the_configuration_means_the_same(family: str, tmp_path: Path) -> None:
    spec = replace(SMALL, family=family, dtype="bfloat16", config={"rope_parameters": LLAMA3})
    new = load(tmp_path, spec)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    file.write_text(json.dumps(raw))
    old = load_model(tmp_path, "auto", CPU)
    assert old.config == new.config
    assert old.dtype == torch.bfloat16


def test_bfloat16_stays_close_to_transformers(tmp_path: Path) -> None:
    spec = replace(SMALL, family="qwen2", dtype="bfloat16", std=0.1)
    loaded = load(tmp_path, spec)
    assert loaded.layout.planes[0].dtype == "bfloat16"
    (prompt,) = prompts_of(spec, 120)
    ours, theirs = RunnerLoop(loaded).logits(prompt), reference_logits(make_model(spec), prompt)
    exact = reference_logits(make_model(replace(spec, dtype="float32")).bfloat16().float(), prompt)
    assert ours.dtype == torch.float32
    assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()


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
