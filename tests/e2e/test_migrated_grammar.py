"""A greedy text under a JSON schema goes on at another worker as if it had not moved, whichever message came last.

A step's tokens come in one message: what a grammar forces behind a sampled token is never cut off from it.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tandem.cluster import new_id
from tandem.testing.pair import Pair, pair
from tandem.testing.schemas import random_schema
from tandem.text.tokenizer import Tokenizer
from tandem.types import Delta, FinishReason, GenerateRequest, Grammar, GrammarKind, SamplingParams

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
CUTS = 6


def record_ends(workers: Pair) -> list[int]:
    """How many tokens there were after each message, from now on."""
    ends: list[int] = []
    shipped = Pair._take.__get__(workers)

    def take(delta: Delta) -> None:
        shipped(delta)
        ends.append(delta.first_index + len(delta.tokens))

    workers._take = take  # type: ignore[method-assign]
    return ends


@pytest.mark.parametrize("overlap", ["off", "on"])
async def test_a_moved_schema_gives_the_same_text(overlap: str) -> None:
    tokenizer = Tokenizer.load(str(MODEL))
    prompt = tuple(tokenizer.encode("Describe it as JSON, please. " * 6))
    schemas = [random_schema(seed) for seed in (0, 3)]
    async with pair(MODEL, dtype="float32", overlap=overlap) as workers:
        for schema in schemas:
            grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
            sampling = SamplingParams(temperature=0.0, max_tokens=300, grammar=grammar)
            ends = record_ends(workers)
            (whole,) = await workers.generate(prompt, sampling)
            assert whole.finish is FinishReason.STOP
            jsonschema.validate(json.loads(tokenizer.decode(whole.tokens)), schema)
            cuts = [made for made in ends if made < len(whole.tokens)]
            assert len(cuts) > 2
            for made in cuts[:: max(1, len(cuts) // CUTS)]:
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
