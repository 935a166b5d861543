"""Structured output through real workers: texts are what was asked for, on every way through the cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from tandem.testing.pair import Answer, Pair, pair
from tandem.testing.schemas import random_schema
from tandem.text.tokenizer import Tokenizer
from tandem.types import FinishReason, Grammar, GrammarKind, SamplingParams

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
SCHEMAS = 16
TOKENS = 512
TOKENIZER = Tokenizer.load(str(MODEL))
PROMPT = TOKENIZER.encode("Describe it as JSON, please. " * 12)


def text_of(answer: Answer) -> str:
    return TOKENIZER.decode(answer.tokens)


async def ask(workers: Pair, grammar: Grammar, seed: int, **more: float) -> Answer:
    sampling = SamplingParams(seed=seed, max_tokens=TOKENS, grammar=grammar, **more)  # type: ignore[arg-type]
    (answer,) = await workers.generate(PROMPT, sampling)
    return answer


async def every_schema(workers: Pair, temperature: float) -> list[list[int]]:
    names = []
    for seed in range(SCHEMAS):
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(random_schema(seed)))
        sampling = SamplingParams(seed=seed, max_tokens=TOKENS, grammar=grammar, temperature=temperature)
        names.append(await workers.submit(PROMPT, sampling))
    answers = [(await workers.answer(name))[0] for name in names]
    for seed, answer in enumerate(answers):
        assert answer.finish is FinishReason.STOP, (seed, text_of(answer))
        jsonschema.validate(json.loads(text_of(answer)), random_schema(seed))
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_texts_validate_and_do_not_depend_on_the_way(temperature: float) -> None:
    async with pair(MODEL, dtype="float32", prefill=0) as workers:
        alone = await every_schema(workers, temperature)
    async with pair(MODEL, dtype="float32", prefill=1, max_batch_tokens=24, decode_settings={"pages": 44}) as workers:
        assert await every_schema(workers, temperature) == alone


async def test_other_grammars_hold_too() -> None:
    async with pair(MODEL, prefill=0) as workers:
        for seed in range(4):
            answer = await ask(workers, Grammar(GrammarKind.REGEX, r"[A-F]{3}-[0-9]{2,4}(xyz)?"), seed)
            assert re.fullmatch(r"[A-F]{3}-[0-9]{2,4}(xyz)?", text_of(answer)), text_of(answer)
        answer = await ask(workers, Grammar(GrammarKind.EBNF, 'root ::= "yes" tail\ntail ::= "!" | "?" tail'), 1)
        assert re.fullmatch(r"yes\?*!", text_of(answer))
        assert answer.finish is FinishReason.STOP

        # A complete text ends, whatever else was asked for.
        grammar = Grammar(GrammarKind.REGEX, "ab?")
        (answer,) = await workers.generate(PROMPT, SamplingParams(grammar=grammar, max_tokens=99, min_tokens=50))
        assert text_of(answer) == "ab" and answer.finish is FinishReason.STOP
        (answer,) = await workers.generate(PROMPT, SamplingParams(grammar=grammar, max_tokens=99, ignore_eos=True))
        assert text_of(answer) in ("a", "ab") and answer.finish is FinishReason.STOP


async def test_forced_text_is_appended_at_once_and_counts_as_output() -> None:
    fixed = '{"a rather long name of a field": "and the one value that it has"}'
    grammar = Grammar(GrammarKind.REGEX, re.escape(fixed).replace("\\ ", " "))
    async with pair(MODEL, dtype="float32", prefill=0) as workers:
        forced = workers.decode.metrics.forced_tokens
        answer = await ask(workers, grammar, 1)
        assert text_of(answer) == fixed and answer.finish is FinishReason.STOP
        assert answer.usage is not None and answer.usage.completion_tokens == len(answer.tokens)
        assert forced._value.get() >= len(answer.tokens) - 3

        counted = forced._value.get()
        scored = await ask(workers, grammar, 1, logprobs=0)
        assert text_of(scored) == fixed and len(scored.logprobs) == len(scored.tokens)
        assert forced._value.get() == counted, "each token's log-probability is the model's own"

        (short,) = await workers.generate(PROMPT, SamplingParams(grammar=grammar, max_tokens=5, seed=1))
        assert short.tokens == answer.tokens[:5] and short.finish is FinishReason.LENGTH


async def test_thoughts_are_free_and_the_answer_is_not() -> None:
    async with pair(MODEL, dtype="float32", prefill=0) as workers:
        (free,) = await workers.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        grammar = Grammar(GrammarKind.REGEX, "[0-9]{3}", after=tuple(free.tokens[6:8]))
        (bound,) = await workers.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=64, grammar=grammar))
        end = next(at for at in range(len(free.tokens)) if tuple(free.tokens[at : at + 2]) == grammar.after) + 2
        assert bound.tokens[:end] == free.tokens[:end]
        assert re.fullmatch("[0-9]{3}", TOKENIZER.decode(bound.tokens[end:]))
