"""Real processes, real gRPC, real NIXL over loopback, and the `openai` client. Each ends with the leak check."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIError, AsyncOpenAI

from tandem import obs
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster

PROMPT_TOKENS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint whose answers depend on every part of the prompt."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", CheckpointSpec(family="llama", seed=1))


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One router, one prefill and one decode worker."""
    with cluster(model, tmp_path_factory.mktemp("pair"), worker_args=["--kv-mib", "16"]) as running:
        yield running


def client(running: Cluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)


def prompt_ids(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    return [(seed * 31 + position * 17) % 250 for position in range(length)]


async def test_one_greedy_request_equals_transformers(pair: Cluster, model: Path) -> None:
    """router -> decode -> prefill -> NIXL -> decode -> router, token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = prompt_ids(0)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(16):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ids[len(prompt) :]
    async with client(pair) as openai:
        answer = await openai.completions.create(
            model="llama", prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    while pair.metric("tandem_kv_moved_bytes_total") == 0:
        await asyncio.sleep(0.05)
    assert 'transport="nixl"' in pair.get("/metrics")
    pair.check_leaks()


async def test_the_next_turn_finds_its_history(pair: Cluster) -> None:
    """All that is reusable is reported as cached: the prompt and the generated answer, to the last page."""
    messages: list[dict[str, str]] = [{"role": "user", "content": "tell me a long story about " + "trains " * 30}]
    async with client(pair) as openai:
        first = await openai.chat.completions.create(
            model="llama",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=40,
            seed=3,
        )
        assert first.usage is not None
        messages += [{"role": "assistant", "content": first.choices[0].message.content or ""}]
        messages += [{"role": "user", "content": "go on"}]
        second = await openai.chat.completions.create(model="llama", messages=messages, max_tokens=4)  # type: ignore[arg-type]
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    reusable = (first.usage.prompt_tokens + first.usage.completion_tokens - 1) // 16 * 16
    if first.choices[0].finish_reason == "stop":
        assert cached >= reusable
    else:
        # Cut by max_tokens: the next turn closes the turn where the model did not, so its last token may differ.
        assert cached >= reusable - 16
    pair.check_leaks()


async def test_a_client_that_goes_away_frees_its_pages(pair: Cluster) -> None:
    async with client(pair) as openai:
        stream = await openai.completions.create(
            model="llama", prompt=prompt_ids(5), max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    pair.check_leaks()


async def _stream(openai: AsyncOpenAI, seed: int, tokens: int) -> tuple[int, str]:
    """Streams one completion; returns (tokens by usage, "" or the error's text)."""
    count = 0
    try:
        stream = await openai.completions.create(
            model="llama",
            prompt=prompt_ids(seed),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
    except APIError as error:
        return count, str(error)
    return count, ""


async def test_killing_a_prefill_worker_is_invisible(model: Path, tmp_path: Path) -> None:
    with cluster(model, tmp_path, prefill=2, decode=1, worker_args=["--kv-mib", "16"]) as running:
        async with client(running) as openai:
            streams = [asyncio.create_task(_stream(openai, seed, 60)) for seed in range(8)]
            await asyncio.sleep(0)
            streams += [asyncio.create_task(_stream(openai, seed, 60)) for seed in range(8, 16)]
            while not any(task.done() for task in streams) and running.metric("tandem_kv_moved_bytes_total") == 0:
                await asyncio.sleep(0.01)
            running.workers["prefill-0"].kill()
            results = await asyncio.gather(*streams)
        assert results == [(60, "")] * 16


async def test_killing_a_decode_worker_is_invisible(model: Path, tmp_path: Path) -> None:
    with cluster(model, tmp_path, prefill=1, decode=2, worker_args=["--kv-mib", "16"]) as running:
        async with client(running) as openai:
            streams = [asyncio.create_task(_stream(openai, seed, 400)) for seed in range(16)]
            while running.metric(obs.FIRST_TOKEN_SECONDS + "_count") < 16:
                await asyncio.sleep(0.02)
            busy = [process for name, process in running.workers.items() if "decode" in name and running.audit(process)]
            busy[0].kill()
            results = await asyncio.gather(*streams)
            assert results == [(400, "")] * 16
            assert running.metric(obs.REQUESTS_MOVED_TOTAL) > 0
            busy[0].start()
            running.wait_ready()
            before = running.audit(busy[0])
            assert before == []
            again = await asyncio.gather(*(_stream(openai, 100 + seed, 8) for seed in range(16)))
            assert again == [(8, "")] * 16
