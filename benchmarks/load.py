"""A closed-loop load on any OpenAI-compatible endpoint: black box, over HTTP, streamed.

python -m benchmarks.load --concurrency 8 --requests 64 --prompt-tokens 300 --output-tokens 64
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table


@dataclass
class Sample:
    """One request as its client saw it; seconds."""

    ttft: float = 0.0
    generating: float = 0.0
    """From the first chunk to the last."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What a load measured. Latencies in milliseconds."""

    requests: int
    errors: int
    seconds: float
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    """Time per output token after the first, by request: chunks are no measure, for a chunk may hold several tokens."""
    tpot_p99_ms: float
    cached_share: float


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    """Streams one completion."""
    sample, started = Sample(), time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            sample.error = (await answer.aread()).decode()
            return sample
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now, chunk = time.perf_counter(), json.loads(line[6:])
            if "error" in chunk:
                sample.error = chunk["error"]["message"]
            elif chunk.get("usage"):
                usage = chunk["usage"]
                sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            elif not sample.ttft:
                sample.ttft = now - started
            else:
                sample.generating = now - started - sample.ttft
    return sample


async def run(
    url: str,
    concurrency: int,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    shared_tokens: int = 0,
    seed: int = 0,
) -> Report:
    """`concurrency` clients, each sending its next request when the last one ended, until `requests` were sent."""
    rng = random.Random(seed)
    shared = [rng.randrange(8, 250) for _ in range(shared_tokens)]
    bodies = [
        {
            "prompt": shared + [rng.randrange(8, 250) for _ in range(prompt_tokens - shared_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(requests)
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        samples: list[Sample] = []

        async def worker() -> None:
            while bodies:
                samples.append(await one(client, {"model": model, **bodies.pop()}))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return report(samples, time.perf_counter() - started)


def report(samples: list[Sample], seconds: float) -> Report:
    """Sums up; failed requests count as errors and nowhere else."""
    good = [sample for sample in samples if not sample.error]
    ttfts = [s.ttft * 1e3 for s in good]
    tpots = [s.generating * 1e3 / (s.output_tokens - 1) for s in good if s.output_tokens > 1]
    prompts = sum(s.prompt_tokens for s in good)
    return Report(
        requests=len(samples),
        errors=len(samples) - len(good),
        seconds=seconds,
        output_tokens_per_s=sum(s.output_tokens for s in good) / seconds,
        ttft_p50_ms=median(ttfts) if ttfts else 0.0,
        ttft_p99_ms=percentile(ttfts, 0.99),
        tpot_p50_ms=median(tpots) if tpots else 0.0,
        tpot_p99_ms=percentile(tpots, 0.99),
        cached_share=sum(s.cached_tokens for s in good) / prompts if prompts else 0.0,
    )


def show(rows: dict[str, Report], title: str) -> None:
    """A table and, below it, the same as JSON."""
    table = Table(title=title)
    for column in ("", *Report.__dataclass_fields__):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values())
        )
    Console(width=200).print(table)
    print(json.dumps({name: asdict(row) for name, row in rows.items()}))


def main(
    url: str = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1)] = 8,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 300,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    shared_tokens: Annotated[int, typer.Option(min=0, help="tokens that all prompts start with")] = 0,
    seed: int = 0,
) -> None:
    """One load, one table."""
    result = asyncio.run(run(url, concurrency, requests, prompt_tokens, output_tokens, shared_tokens, seed))
    show({"load": result}, f"{url}: {prompt_tokens} in, {output_tokens} out, concurrency {concurrency}")


if __name__ == "__main__":
    typer.run(main)
