"""Requests with the same prompt that reach a decode worker together, to be prefilled there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tandem.testing.pair import pair
from tandem.types import SamplingParams

PROMPT = tuple(range(10, 210))
SAMPLING = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


async def test_their_prompt_is_computed_once(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        names = await asyncio.gather(*(workers.submit(PROMPT, SAMPLING) for _ in range(4)))
        answers = [(await workers.answer(name))[0] for name in names]
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        computed = workers.decode.metrics.registry.get_sample_value("tandem_worker_step_tokens_total")
        # The first computes all of it, each other one what is behind the last whole page; then each decodes three more.
        assert computed == 200 + 3 * (200 % 16) + 4 * 3
