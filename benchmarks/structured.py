"""Structured output over HTTP: whether answers are what was asked for, and what holding them to it costs or saves.

    python -m benchmarks.structured                       # the demo model
    python -m benchmarks.structured --model qwen2-370m --schemas 0 --samples 0 --output-tokens 48 --answers 1

Answers: random schemas, regular expressions and grammars, each checked by something else than what enforced it.
Overhead: a grammar that allows every text, against none. Jump-forward: a schema of which most is fixed, against the
same with log-probabilities, which make the server ask the model for every token. On and off take turns in one run.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import jsonschema
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load import Endpoint, Load, run
from benchmarks.report import summarize, write_json
from benchmarks.shapes import checkpoint
from benchmarks.systems import Peers, Setting, StartError, server
from benchmarks.workloads import Shape, make
from tandem.errors import ConfigError
from tandem.testing.schemas import random_schema

SYSTEM = "tandem-0p1d"
MESSAGES = [{"role": "user", "content": "Describe it, please."}]
ANY_TEXT = r"(.|\n)*"
BATCH = 8
REGEXES = (
    r"[A-F]{3}-[0-9]{2,4}(xyz)?",
    r"(yes|no)(, (maybe|never)){0,3}\.",
    r"\d{4}-\d{2}-\d{2}",
    r"[a-z]{1,12}@[a-z]{2,8}\.org",
)
TEMPLATE = {
    "type": "object",
    "properties": {
        f"a_rather_long_name_of_field_number_{index}": {"enum": [f"the one value that field {index} can have"]}
        for index in range(6)
    }
    | {"the_answer_to_the_question": {"type": "boolean"}},
}
TEMPLATE["required"] = list(TEMPLATE["properties"])


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth < 0:
            return False
    return depth == 0 and re.fullmatch(r"[()0-9+]+", text) is not None and "()" not in text and ")(" not in text


GRAMMARS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ('root ::= sum\nsum ::= term | term "+" sum\nterm ::= [0-9]{1,3} | "(" sum ")"', _balanced),
    ('root ::= "yes" tail\ntail ::= "!" | "?" tail', lambda text: re.fullmatch(r"yes\?*!", text) is not None),
    ('root ::= row ("\\n" row){2}\nrow ::= [0-9]{1,4} ("," [0-9]{1,4}){3}', lambda text: _table(text)),
)  # fmt: skip


def _table(text: str) -> bool:
    rows = [row.split(",") for row in text.split("\n")]
    return len(rows) == 3 and all(len(row) == 4 and all(map(str.isdecimal, row)) for row in rows)


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked for, and what tells whether an answer is that."""

    fields: dict[str, Any]
    valid: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers of one kind at one temperature."""

    kind: str
    temperature: float
    asked: int
    finished: int
    """Ended by themselves, within the limit of tokens."""
    valid: int
    """Of those that finished."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The same work on and off, in turns; medians over the rounds, and the median of each round's ratio."""

    what: str
    on: float
    off: float
    ratio: float


def cases(schemas: int, samples: int) -> dict[str, list[Case]]:
    """By kind."""
    made = [random_schema(seed) for seed in range(schemas)]
    return {
        "JSON schemas": [Case({"json_schema": schema}, _by_schema(schema)) for schema in made],
        "regular expressions": [Case({"regex": each}, _by_pattern(each)) for each in REGEXES for _ in range(samples)],
        "grammars": [Case({"ebnf": text}, valid) for text, valid in GRAMMARS for _ in range(samples)],
    }


def _by_schema(schema: dict[str, Any]) -> Callable[[str], bool]:
    def valid(text: str) -> bool:
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError):
            return False
        return True

    return valid


def _by_pattern(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


async def outcomes(url: str, kind: str, asked: Sequence[Case], temperature: float, limit: int) -> Outcome:
    """Asks all cases, `BATCH` at a time. Raises ConnectionError at an answer that is none."""
    slots = asyncio.Semaphore(BATCH)

    async def ask(client: httpx.AsyncClient, seed: int, case: Case) -> tuple[bool, bool]:
        body = {"messages": MESSAGES, "temperature": temperature, "seed": seed, "max_tokens": limit, **case.fields}
        async with slots:
            answer = await client.post(url + "/v1/chat/completions", json=body)
        if answer.status_code != 200:
            raise ConnectionError(f"{kind}, case {seed}: {answer.status_code} {answer.text[:300]}")
        choice = answer.json()["choices"][0]
        stopped = choice["finish_reason"] == "stop"
        return stopped, stopped and case.valid(choice["message"]["content"])

    async with httpx.AsyncClient(timeout=600) as client:
        found = await asyncio.gather(*(ask(client, seed, case) for seed, case in enumerate(asked)))
    return Outcome(kind, temperature, len(asked), sum(f for f, _ in found), sum(v for _, v in found))


def in_turns(what: str, rounds: int, measure: Callable[[bool], float]) -> Pace:
    """measure: of on (True) or off. One more round comes first and does not count; the order alternates."""
    pairs = []
    for turn in range(rounds + 1):
        order = (True, False) if turn % 2 else (False, True)
        pairs.append({on: measure(on) for on in order})
    counted = pairs[1:]
    ratio = median(pair[True] / pair[False] for pair in counted)
    return Pace(what, median(pair[True] for pair in counted), median(pair[False] for pair in counted), ratio)


def overhead(url: str, tokens: int, rounds: int) -> Pace:
    """Output tokens a second with a grammar that allows every text, and without."""

    def measure(on: bool) -> float:
        endpoint = Endpoint(url, extra=(("regex", ANY_TEXT),) if on else ())
        prompts = make("random", Shape(requests=2 * BATCH, input_tokens=32, output_tokens=tokens), 0)
        report = summarize(asyncio.run(run(endpoint, prompts, Load(concurrency=BATCH))))
        if report.errors:
            raise ConnectionError(f"requests failed: {report.errors}")
        return report.output_tokens_per_s

    return in_turns("output tokens/s at batch 8, with a grammar that allows every text", rounds, measure)


def jump_forward(url: str, rounds: int, answers: int, schema: dict[str, Any] | None) -> Pace:
    """Milliseconds an answer, one at a time; off: with log-probabilities. schema: None frees the answer."""
    fixed = {"json_schema": schema} if schema else {"max_tokens": 128, "min_tokens": 128, "ignore_eos": True}
    what = "ms an answer of a schema that fixes most of it" if schema else "ms an answer without a grammar"

    def measure(on: bool) -> float:
        scores = {} if on else {"logprobs": True, "top_logprobs": 0}
        with httpx.Client(timeout=600) as client:
            started = time.perf_counter()
            for seed in range(answers):
                body = {"messages": MESSAGES, "seed": seed, "max_tokens": 512, **fixed, **scores}
                client.post(url + "/v1/chat/completions", json=body).raise_for_status()
            return (time.perf_counter() - started) * 1e3 / answers

    return in_turns(f"{what}, without log-probabilities", rounds, measure)


def show(found: Sequence[Outcome], paces: Sequence[Pace], title: str) -> None:
    """Prints both tables."""
    console = Console()
    if found:
        table = Table("", "temperature", "asked", "finished", "valid of these", title=title)
        for each in found:
            finished, valid = f"{each.finished / each.asked:.1%}", f"{each.valid / max(1, each.finished):.1%}"
            table.add_row(each.kind, f"{each.temperature:g}", str(each.asked), finished, valid)
        console.print(table)
    table = Table("", "on", "off", "on / off", title=title)
    for pace in paces:
        table.add_row(pace.what, f"{pace.on:.1f}", f"{pace.off:.1f}", f"{pace.ratio:.3f}")
    console.print(table)


def main(
    model: Annotated[
        str, typer.Option(help="demo, a shape of benchmarks/shapes.py, or what `tandem up` takes")
    ] = "demo",
    schemas: Annotated[int, typer.Option(min=0)] = 200,
    samples: Annotated[int, typer.Option(min=0, help="answers of each regular expression and grammar")] = 10,
    temperatures: Annotated[list[float] | None, typer.Option(help="repeatable; default 1 and 0")] = None,
    limit: Annotated[int, typer.Option(min=1, help="tokens of an answer that is to finish")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="of each answer when overhead is measured")] = 256,
    answers: Annotated[int, typer.Option(min=1, help="in a turn when jump-forward is measured")] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Starts one decode worker and a router, and measures all three."""
    found: list[Outcome] = []
    try:
        folder = Path(tempfile.mkdtemp(prefix="tandem-structured-"))
        with server(SYSTEM, Setting(checkpoint(model)), Peers(), folder).running() as url:
            for kind, asked in cases(schemas, samples).items():
                for temperature in temperatures or [1.0, 0.0]:
                    found += [asyncio.run(outcomes(url, kind, asked, temperature, limit))] if asked else []
            paces = [
                overhead(url, output_tokens, rounds),
                jump_forward(url, rounds, answers, TEMPLATE),
                jump_forward(url, rounds, answers, None),
            ]
    except (ConnectionError, ConfigError, StartError, httpx.HTTPError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(found, paces, f"structured output, {model}")
    if json_file:
        write_json(json_file, {"model": model, "answers": list(map(asdict, found)), "paces": list(map(asdict, paces))})


if __name__ == "__main__":
    typer.run(main)
