"""The comparison of `test_equality`, over HTTP with real processes and NIXL, for one family."""

from __future__ import annotations

import asyncio
from pathlib import Path

from openai import AsyncOpenAI
from transformers import AutoTokenizer

from tandem.testing.cluster import cluster
from tandem.testing.reference import MARGIN, TOLERANCE, Reference

STEPS = 8


def greedy(reference: Reference, prompt: tuple[int, ...]) -> tuple[list[int], list[float], bool]:
    """The reference's answer, its log-probabilities, and whether it is clear at every step."""
    ids: list[int] = []
    logprobs: list[float] = []
    clear = True
    for _ in range(STEPS):
        logits = reference.logits((*prompt, *ids))[-1]
        best = logits.topk(2)
        clear = clear and float(best.values[0] - best.values[1]) > MARGIN
        ids.append(int(best.indices[0]))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids, logprobs, clear


async def test_every_prompt_is_answered_as_the_reference_does(subjects: dict[str, object], tmp_path: Path) -> None:
    subject = subjects["llama"]
    path, reference, prompts = subject.path, subject.reference, subject.prompts  # type: ignore[attr-defined]
    tokenizer = AutoTokenizer.from_pretrained(path)
    with cluster(path, tmp_path, worker_args=["--kv-mib", "16"]) as running:
        async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="llama",
                        prompt=list(prompt),
                        max_tokens=STEPS,
                        temperature=0,
                        logprobs=1,
                        extra_body={"ignore_eos": True},
                    )
                    for prompt in prompts
                )
            )
        while running.metric("tandem_kv_moved_bytes_total") == 0:
            await asyncio.sleep(0.05)
    expected = [greedy(reference, prompt) for prompt in prompts]
    assert sum(clear for _, _, clear in expected) >= len(prompts) - 2
    for answer, (ids, logprobs, clear) in zip(answers, expected, strict=True):
        if clear:
            choice = answer.choices[0]
            assert choice.text == tokenizer.decode(ids, skip_special_tokens=True)
            assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
            errors = [abs(a - b) for a, b in zip(choice.logprobs.token_logprobs, logprobs, strict=True)]
            assert max(errors) <= TOLERANCE
