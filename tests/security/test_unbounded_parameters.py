"""CVE-2026-34756, CVE-2024-8939, CVE-2026-5497, CVE-2026-21869: a number, list or string that nobody bounds.

Each field that the published document names gets values beyond its own bounds, and values beyond any; each is refused
by name before anything is submitted, and the next request works.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from router.http.openapi import document
from tests.security.rig import Front

MANY = 1_000_000
DOCUMENT: dict[str, Any] = document("Tandem", False)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatBody": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    "CompletionBody": ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
    "TokenizeBody": ("/tokenize", {"prompt": "hi"}),
    "DetokenizeBody": ("/detokenize", {"tokens": [1]}),
}
LITERALS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400")
GROWTH_BYTES = 256 << 20
"""Of this process, at any moment of the whole battery: bodies have megabytes, and no value may become gigabytes."""

WIDE_INTEGERS = {"seed"}
"""Every 64-bit number is a seed."""
TEXTS = {("TokenizeBody", "prompt"), ("DetokenizeBody", "tokens")}
"""The body's own limit is theirs: the answer is as long as the question."""


@pytest.fixture(scope="module")
def settled() -> int:
    """Bytes of this process before the battery, without those that earlier tests have freed."""
    gc.collect()
    give_back()
    size: int = psutil.Process().memory_info().rss
    return size


def give_back() -> None:
    """What is freed goes to the system, as by `tandem.freed_memory`: the heap of each thread keeps it otherwise."""
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """`peak` is of what comes now: that of the process's whole life would be an earlier test's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of this process at its largest moment since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def test_a_peak_is_seen_and_an_earlier_one_forgotten(settled: int) -> None:
    forget_peak()
    bytearray(b"x") * (2 * GROWTH_BYTES)
    assert peak() - settled > GROWTH_BYTES
    forget_peak()
    assert peak() - settled < GROWTH_BYTES


def options(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The forms that a value may have."""
    if "$ref" in schema:
        yield from options(SCHEMAS[schema["$ref"].rsplit("/", 1)[1]])
    elif "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from options(each)
    else:
        yield schema


def beyond(schema: dict[str, Any]) -> Iterator[Any]:
    """Values just outside what a form allows."""
    if schema.get("type") in ("integer", "number"):
        step = 1 if schema["type"] == "integer" else 0.001
        for name, sign in (("minimum", -1), ("maximum", 1)):
            if name in schema:
                yield schema[name] + sign * step
        for name, sign in (("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
            if name in schema:
                yield schema[name] + sign
    elif schema.get("type") == "string":
        if schema.get("minLength"):
            yield ""
        if "maxLength" in schema:
            yield "x" * (schema["maxLength"] + 1)
    elif schema.get("type") == "array":
        if schema.get("minItems"):
            yield []
        if "maxItems" in schema:
            yield ["a"] * (schema["maxItems"] + 1)


SCHEMAS_OF_ANSWERS = {"json_schema", "guided_json"}
"""Keywords that nobody knows say nothing of an answer; how large it may be is tested with grammars."""
NUMBERS = "[" + "1," * (MANY - 1) + "1]"
TEXT = '"' + "x" * MANY + '"'
KEYS = json.dumps({f"k{at}": 1 for at in range(5000)})


def hostile(name: str, forms: list[dict[str, Any]]) -> Iterator[str]:
    """Values, as JSON, that no field of these forms can want."""
    kinds = {form.get("type") for form in forms}
    yield TEXT
    if name not in SCHEMAS_OF_ANSWERS:
        yield KEYS
    yield NUMBERS if kinds & {"array", "object", None} else NUMBERS[: MANY // 50] + "1]"
    if kinds & {"integer", "number"}:
        yield from map(str, (-(10**30), 10**30))
        if name not in WIDE_INTEGERS:
            yield from map(str, (-(10**18), 10**18, -(1 << 31) - 1, 1 << 31))


CASES = [
    pytest.param(model, name, id=f"{model}.{name}")
    for model in BASE
    for name in SCHEMAS[model]["properties"]
    if (model, name) not in TEXTS
]


@pytest.mark.parametrize(("model", "name"), CASES)
async def test_values_beyond_bounds_are_refused(
    model: str, name: str, anyone: httpx.AsyncClient, opened: Front, settled: int
) -> None:
    path, base = BASE[model]
    forms = list(options(SCHEMAS[model]["properties"][name]))
    values = [json.dumps(value) for form in forms for value in beyond(form)]
    values += [*hostile(name, forms), *LITERALS]
    forget_peak()
    for value in values:
        body = json.dumps({**base, name: "here"}).replace('"here"', value)
        answer = await anyone.post(path, content=body)
        assert answer.status_code in (400, 404), f"{name} = {value[:60]}: {answer.status_code}"
        error = answer.json()["error"]
        assert len(error["message"]) < 500 and error["type"] == "invalid_request_error"
        assert error["param"] == name, f"{name} = {value[:60]}: {error}"
        if len(value) > MANY // 50:
            give_back()
    assert opened.dispatcher.requests == []
    assert peak() - settled < GROWTH_BYTES
    assert (await anyone.post(path, json=base)).status_code == 200


HI = {"messages": [{"role": "user", "content": "a"}]}
NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "role": ("/v1/chat/completions", {"messages": [{"role": "x" * MANY, "content": "a"}]}),
    "content": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * MANY}]}),
    "parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]},
    ),
    "name": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": "x" * MANY}]}),
    "turns": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5000}),
    "calls": (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}] * 5000}]},
    ),
    "usage": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "stream_options": {"include_usage": [1] * MANY},
        },
    ),
    "prompts": ("/v1/completions", {"prompt": [[1] * 10] * 5000}),
    "text": ("/v1/completions", {"prompt": "x" * MANY}),
    "ids": ("/v1/completions", {"prompt": [1] * MANY}),
    "choices": ("/v1/completions", {"prompt": ["a"] * 128, "n": 128}),
}


FIELDS = dict.fromkeys(NESTED, "messages") | {
    "usage": "stream_options",
    "prompts": "prompt",
    "text": "prompt",
    "ids": "prompt",
    "choices": "n",
}
"""The field of the body that the error names."""


@pytest.mark.parametrize("name", NESTED)
async def test_what_lies_deeper_is_bounded_too(name: str, anyone: httpx.AsyncClient, opened: Front) -> None:
    path, body = NESTED[name]
    answer = await anyone.post(path, content=json.dumps(body))
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["param"] == FIELDS[name]
    assert opened.dispatcher.requests == []
    assert (
        await anyone.post(path, json=BASE["ChatBody" if "chat" in path else "CompletionBody"][1])
    ).status_code == 200
