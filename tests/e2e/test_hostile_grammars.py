"""Hostile grammars over HTTP: each is refused with what and why, and those who are being served do not wait."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tandem.testing.cluster import Cluster, cluster

log = logging.getLogger(__name__)

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
MESSAGES = [{"role": "user", "content": "Describe it, please."}]
RULES = 2000
SLOW = (
    "root ::= r0\n"
    + "\n".join(f'r{rule} ::= ("a" | "") r{rule + 1} ("b" | "")' for rule in range(RULES))
    + f'\nr{RULES} ::= "x"'
)
"""Takes XGrammar 0.2 longer than half a minute."""
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two seconds and 160 MiB for a grammar."""
    args = ["--kv-mib", "32", "--grammar-compile-s", "2", "--grammar-memory-mib", "160"]
    with cluster(MODEL, tmp_path_factory.mktemp("hostile"), prefill=0, worker_args=args) as made:
        yield made


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"json_schema": json.dumps(deep(70))}, "json_schema", "it is nested more than 64 deep"),
    ({"json_schema": {"enum": [f"value {i} of a very long list" for i in range(7000)]}}, "json_schema", ""),
    ({"json_schema": ENDLESS}, "json_schema", "no finite value can satisfy it"),
    ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}}, "json_schema", "leads to itself"),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json_schema", "no value can satisfy it"),
    ({"json_schema": {"items": {"uniqueItems": True}}}, "json_schema", "/items/uniqueItems: uniqueItems is not supp"),
    ({"regex": "(a"}, "regex", "parenthesis is not closed"),
    ({"regex": r"(a)\1"}, "regex", "Backreference is not supported"),
    ({"ebnf": 'root ::= "a'}, "ebnf", "EBNF"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"not": {}}}}},
     "response_format", "/not: not is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "why"), REFUSED, ids=lambda each: str(each)[:40])
def test_each_is_a_400_that_says_what_and_why(running: Cluster, fields: dict[str, Any], param: str, why: str) -> None:
    answer = httpx.post(running.url + "/v1/chat/completions", json={"messages": MESSAGES, **fields}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and "cannot be served: " in error["message"] and why in error["message"]
    assert len(error["message"].partition("cannot be served: ")[2]) > 10


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a+)+(a+)+(a+)+b{0,3}$"},
        {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        {"type": "string", "format": "date-time"},
        {"allOf": [{"type": "integer"}, {"minimum": 3}], "maximum": 5},
    ],
)
def test_what_only_looks_hostile_is_served(running: Cluster, schema: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "json_schema": schema, "max_tokens": 200, "seed": 3}
    (choice,) = httpx.post(running.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


async def arrivals(client: httpx.AsyncClient, on_token: Callable[[int], None]) -> list[float]:
    """When each token of a long stream came."""
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    found: list[float] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                found.append(time.monotonic())
                on_token(len(found))
    return found


async def test_the_others_do_not_wait_for_a_hostile_compile(
    running: Cluster, record_property: Callable[[str, object], None]
) -> None:
    hostile = {"messages": MESSAGES, "ebnf": SLOW}
    asked = asyncio.Event()
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:

        async def attack() -> tuple[float, float]:
            await asked.wait()
            started = time.monotonic()
            answer = await client.post("/v1/chat/completions", json=hostile)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "ebnf")
            assert "the ebnf cannot be served: compiling it takes longer than 2 s" in error["message"]
            return started, time.monotonic()

        attacking = asyncio.create_task(attack())
        alone = await arrivals(client, lambda count: None)
        streams = []
        while not attacking.done():  # streams without a pause, until the compile has ended
            streams.append(await arrivals(client, lambda count: asked.set() if count == 20 else None))
        started, ended = await attacking
    times = [each for stream in streams for each in stream]
    assert len([each for each in times if started < each < ended]) > 100, "tokens come while the grammar compiles"
    during = [b - a for stream in streams for a, b in itertools.pairwise(stream) if started < a and b < ended]
    before = [b - a for a, b in itertools.pairwise(alone)]
    for name, gaps in (("alone", before), ("during", during)):
        median, worst = statistics.median(gaps) * 1e3, max(gaps) * 1e3
        record_property(f"inter_token_ms_{name}", f"median {median:.2f}, worst {worst:.1f}, of {len(gaps)}")
        log.warning("inter-token ms %s: median %.2f, worst %.1f, of %d", name, median, worst, len(gaps))
