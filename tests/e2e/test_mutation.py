"""The comparison can fail: three mistakes a hand-over could make each turn nearly every answer into a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tandem.engine.sequence import Batch, Sampled
from tandem.kv import Span
from tandem.testing.pair import Pair, pair
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
    rope = workers.decode.engine._runner.model.rope  # type: ignore[attr-defined]
    angles = rope.angles

    def shifted(positions: torch.Tensor, dtype: torch.dtype) -> Any:
        return angles(positions + 1, dtype)

    patch.setattr(rope, "angles", shifted)


async def foreign_page(workers: Pair, patch: Patch) -> None:
    """The page table's first entry is a page of another sequence."""
    await workers.generate(DONOR, GREEDY, salt="donor")
    engine = workers.decode.engine
    root, node = next((root, node) for root, node in engine.memory.cache.nodes() if node.pages)
    donor, run = node.pages[0], engine._runner.run
    assert engine.memory.cache.match(root, node.key, PAGE).tokens == PAGE

    def mistaken(batch: Batch) -> list[Sampled]:
        own = [row.seq.pages[0] for row in batch.rows]
        for row in batch.rows:
            row.seq.pages[0] = donor
        results = run(batch)
        for row, page in zip(batch.rows, own, strict=True):
            row.seq.pages[0] = page
        return results

    patch.setattr(engine._runner, "run", mistaken)


async def swapped_head(workers: Pair, patch: Patch) -> None:
    """What is landed has its two KV heads in the wrong order."""
    pool = workers.decode.engine._pool
    layout, scatter = workers.decode.info.layout, pool.scatter
    assert [plane.heads for plane in layout.planes] == [2, 2]

    def swapping(pages: Sequence[int], span: Span, data: Any) -> None:
        heads = np.asarray(data).reshape(len(layout.planes), layout.num_layers, span.count, 2, -1)
        scatter(pages, span, np.ascontiguousarray(heads[:, :, :, ::-1]).reshape(-1))

    patch.setattr(pool, "scatter", swapping)


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
