"""The comparison can fail: three mistakes a hand-over could make each turn nearly every answer into a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.sequence import Batch
from tandem.kv import Span
from tandem.testing.checkpoints import CheckpointSpec, make_model
from tandem.testing.pair import Pair, pair
from tandem.testing.reference import Reference
from tandem.types import SamplingParams

PAGE = 4
CAUGHT = 0.9
"""Share of the prompts whose tokens must turn out wrong."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
DONOR = tuple(range(100, 100 + PAGE + 1))

Patch = pytest.MonkeyPatch


async def none(workers: Pair, patch: Patch) -> None:
    """No mistake: the yardstick of the others."""


async def rotary_offset(workers: Pair, patch: Patch) -> None:
    """The decode worker goes on one position too far behind the KV that it was given."""
    (rope,) = workers.decode.engine._runner.model.ropes  # type: ignore[attr-defined]
    angles = rope.angles

    def shifted(positions: torch.Tensor, dtype: torch.dtype) -> Any:
        return angles(positions + 1, dtype)

    patch.setattr(rope, "angles", shifted)


async def foreign_page(workers: Pair, patch: Patch) -> None:
    """The page table's first entry is a page of another sequence."""
    await workers.generate(DONOR, GREEDY, salt="donor")
    engine = workers.decode.engine
    root, node = next((root, node) for root, node in engine.memory.cache.nodes() if node.num_tokens)
    donor, launch = node.pages[0][0], engine._runner.launch
    assert engine.memory.cache.match(root, node.key, PAGE).tokens == PAGE

    def mistaken(batch: Batch, after: Any) -> Any:
        own = [row.seq.pages[0][0] for row in batch.rows]
        for row in batch.rows:
            row.seq.pages[0][0] = donor
        flight = launch(batch, after)
        for row, page in zip(batch.rows, own, strict=True):
            row.seq.pages[0][0] = page
        return flight

    patch.setattr(engine._runner, "launch", mistaken)


async def swapped_head(workers: Pair, patch: Patch) -> None:
    """What is landed has its two KV heads in the wrong order."""
    pool = workers.decode.engine._pool
    layout, scatter = workers.decode.info.layout, pool.scatter
    assert [plane.heads for plane in layout.planes] == [2, 2]

    def swapping(pages: Sequence[Sequence[int]], span: Span, total: int, data: Any) -> None:
        heads = np.asarray(data).reshape(len(layout.planes), layout.num_layers, span.count, 2, -1)
        scatter(pages, span, total, np.ascontiguousarray(heads[:, :, :, ::-1]).reshape(-1))

    patch.setattr(pool, "scatter", swapping)


async def test_one_wrong_token_or_log_probability_is_enough(subjects: dict[str, Any]) -> None:
    subject = subjects["llama"]
    prompt, reference = subject.prompts[3], subject.reference
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
    async with pair(subject.path, prefill=0, dtype="float32") as workers:
        (answer,) = await workers.generate(prompt, sampling)
    assert reference.judge(prompt, answer.tokens, answer.logprobs).agrees
    second = answer.logprobs[5].top[1][0]
    wrong = [*answer.tokens[:5], second, *answer.tokens[6:]]
    assert 5 in reference.judge(prompt, wrong).flips
    for step, entry in enumerate(answer.logprobs):
        (best, value), *others = entry.top
        for bad in (
            replace(entry, logprob=entry.logprob - 2e-3),
            replace(entry, top=((best, value + 2e-3), *others)),
            replace(entry, top=((second + 1, value), *others)),
        ):
            changed = [*answer.logprobs[:step], bad, *answer.logprobs[step + 1 :]]
            assert not reference.judge(prompt, answer.tokens, changed).agrees
    with pytest.raises(ValueError, match="8 tokens and 7 log-probabilities"):
        reference.judge(prompt, answer.tokens, answer.logprobs[:7])


def test_a_near_tie_asks_nothing_of_the_token() -> None:
    """Two words of the vocabulary are the same word: their logits tie at every step, and either is right."""
    model = make_model(CheckpointSpec(layers=1, vocab=300, seed=3))
    with torch.no_grad():
        model.lm_head.weight[8] = model.lm_head.weight[7]
        model.lm_head.weight[7:9] *= 100
    reference = Reference(model)
    prompt = next([start] for start in range(300) if reference.logits([start])[-1].argmax() in (7, 8))
    for token in (7, 8):
        assert reference.judge(prompt, [token]).agrees
        assert reference.judge(prompt, [token]).near_ties == 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mistake", [none, rotary_offset, foreign_page, swapped_head])
async def test_a_mistake_flips_tokens(
    mistake: Callable[[Pair, Patch], Any], family: str, subjects: dict[str, Any], monkeypatch: Patch
) -> None:
    subject = subjects[family]
    verdicts = []
    async with pair(subject.path, page_size=PAGE, dtype="float32") as workers:
        await mistake(workers, monkeypatch)
        for number, prompt in enumerate(subject.prompts):
            # A salt each: no prompt may inherit what another one's mistake left in the cache.
            (answer,) = await workers.generate(prompt, GREEDY, salt=str(number))
            verdicts.append(subject.reference.judge(prompt, answer.tokens, answer.logprobs))
    if mistake is none:
        assert all(verdict.agrees for verdict in verdicts)
    else:
        assert len(verdicts) == 32
        assert sum(bool(verdict.flips) for verdict in verdicts) >= CAUGHT * len(verdicts)
