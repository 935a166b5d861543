"""Hugging Face's continuous batching behind /v1/completions: as little as a load needs, for comparisons only.

    python -m benchmarks.hf_server MODEL_DIR --port 8200

transformers' own `transformers serve` takes prompts as text only and stops where the model wants to; exact lengths need
token ids. Batching, paging and sampling are transformers' own (`ContinuousBatchingManager`), greedy.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

NO_TOKEN = -1
"""As end of sequence: none, so that answers have the length that was asked for."""


def start(folder: Path, dtype: str, threads: int, kv_tokens: int) -> tuple[Any, Any]:
    """The running manager and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    block = 32
    manager = model.eval().init_continuous_batching(
        GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0),
        ContinuousBatchingConfig(page_size=block, num_blocks=kv_tokens // block, max_batch_tokens=512),
    )
    manager.start()
    return manager, AutoTokenizer.from_pretrained(folder)


def make_app(manager: Any, tokenizer: Any, name: str) -> FastAPI:
    """The two routes that a load asks."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(_events(manager, tokenizer, await request.json()), media_type="text/event-stream")

    return app


async def _events(manager: Any, tokenizer: Any, body: dict[str, Any]) -> AsyncIterator[str]:
    """One chunk for each token, then the usage."""
    results: asyncio.Queue[Any] = asyncio.Queue()
    name = f"request-{id(results)}"
    manager.register_result_handler(name, results.put_nowait)
    manager.add_request(
        list(body["prompt"]), request_id=name, max_new_tokens=body["max_tokens"], streaming=True, eos_token_id=NO_TOKEN
    )
    sent = 0
    while True:
        result = await results.get()
        if result.error:
            yield f"data: {json.dumps({'error': {'message': result.error, 'type': 'engine'}})}\n\n"
            return
        if new := result.generated_tokens[sent:]:
            sent += len(new)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': tokenizer.decode(new)}]})}\n\n"
        if result.is_finished():
            break
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def main(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    port: int = 8200,
    dtype: str = "bfloat16",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    kv_tokens: Annotated[int, typer.Option(help="tokens of KV in all")] = 16_384,
) -> None:
    """Serves until told to stop."""
    manager, tokenizer = start(model, dtype, threads, kv_tokens)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvicorn.run(make_app(manager, tokenizer, model.name), host="127.0.0.1", port=port, log_level="warning")
    finally:
        manager.stop(block=True, timeout=5)


if __name__ == "__main__":
    typer.run(main)
