"""A greedy text under a JSON schema goes on at another worker as if it had not moved, wherever it was cut."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tandem.cluster import new_id
from tandem.testing.pair import pair
from tandem.testing.schemas import random_schema
from tandem.text.tokenizer import Tokenizer
from tandem.types import FinishReason, GenerateRequest, Grammar, GrammarKind, SamplingParams

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
CUTS = 6


@pytest.mark.parametrize("overlap", ["off", "on"])
async def test_a_moved_schema_gives_the_same_text(overlap: str) -> None:
    tokenizer = Tokenizer.load(str(MODEL))
    prompt = tuple(tokenizer.encode("Describe it as JSON, please. " * 6))
    schemas = [random_schema(seed) for seed in (0, 3)]
    async with pair(MODEL, dtype="float32", overlap=overlap) as workers:
        for schema in schemas:
            grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
            sampling = SamplingParams(temperature=0.0, max_tokens=300, grammar=grammar)
            (whole,) = await workers.generate(prompt, sampling)
            assert whole.finish is FinishReason.STOP
            jsonschema.validate(json.loads(tokenizer.decode(whole.tokens)), schema)
            step = max(1, len(whole.tokens) // CUTS)
            for made in range(1, len(whole.tokens), step):
                request = GenerateRequest(
                    new_id(),
                    "test",
                    prompt,
                    sampling,
                    attempt=1,
                    generated=(tuple(whole.tokens[:made]),),
                    salt=str(made),
                )
                await workers.send(request)
                (rest,) = await workers.answer(request.request_id)
                assert (rest.tokens, rest.finish) == (whole.tokens, whole.finish), f"cut after {made} tokens"
