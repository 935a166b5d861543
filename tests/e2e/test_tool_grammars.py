"""Calls that are forced, and calls of strict functions, from a real cluster: they are what their schemas say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tandem.testing.cluster import Cluster, cluster
from tandem.testing.schemas import random_schema

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
SCHEMAS = 10
TOKENS = 512
MARKER_ID = 0
"""The demo's padding token, which plays the marker of a model whose marker is special."""
MESSAGES = [{"role": "user", "content": "Describe it, please."}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }} Call by tool_call.<|end|>{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' }}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The demo model with tools in its template and a special token that begins its calls."""
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(MODEL, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / "model" / name
        file.write_text(file.read_text().replace("<|pad|>", "<tool_call>"))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    with cluster(folder / "model", folder, worker_args=["--kv-mib", "32", "--dtype", "float32"]) as made:
        yield made


def tool(seed: int, strict: bool = True) -> dict[str, Any]:
    function = {"name": f"tool_{seed}", "strict": strict, "parameters": random_schema(seed)}
    return {"type": "function", "function": function}


def body(seed: int, **fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "seed": seed, "max_tokens": TOKENS, "tools": [tool(seed), tool(seed + 1)], **fields}


def ask(running: Cluster, asked: dict[str, Any]) -> dict[str, Any]:
    """The whole answer's choice, after checking that a stream says the same."""
    whole = httpx.post(running.url + "/v1/chat/completions", json=asked, timeout=60)
    assert whole.status_code == 200, whole.text
    choice: dict[str, Any] = whole.json()["choices"][0]
    text, calls, finish = "", [], None
    with httpx.stream(
        "POST", running.url + "/v1/chat/completions", json={**asked, "stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (part,) = json.loads(line[6:])["choices"]
            text += part["delta"].get("content") or ""
            finish = part["finish_reason"]
            for call in part["delta"].get("tool_calls", ()):
                if "id" in call:
                    calls.append(["", ""])
                calls[call["index"]][0] += call["function"].get("name") or ""
                calls[call["index"]][1] += call["function"].get("arguments") or ""
    assert text == (choice["message"]["content"] or "") and finish == choice["finish_reason"]
    assert calls == [list(call) for call in calls_of(choice)]
    return choice


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    found = choice["message"].get("tool_calls") or []
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found]


def check(choice: dict[str, Any], seed: int) -> int:
    """How many calls there are, each as its schema says."""
    calls = calls_of(choice)
    complete = calls if choice["finish_reason"] == "tool_calls" else calls[:-1]
    for name, given in complete:
        assert name in (f"tool_{seed}", f"tool_{seed + 1}")
        jsonschema.validate(json.loads(given), random_schema(int(name.removeprefix("tool_"))))
    return len(complete)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_calls_are_what_their_schemas_say(running: Cluster, temperature: float) -> None:
    complete = 0
    for seed in range(SCHEMAS):
        named = {"type": "function", "function": {"name": f"tool_{seed}"}}
        choice = ask(running, body(seed, tool_choice=named, temperature=temperature))
        assert [name for name, _ in calls_of(choice)] == [f"tool_{seed}"] and not choice["message"]["content"]
        assert check(choice, seed) == 1 and choice["finish_reason"] == "tool_calls"
        choice = ask(running, body(seed, tool_choice="required", temperature=temperature, parallel_tool_calls=False))
        assert check(choice, seed) == len(calls_of(choice)) == 1 and not choice["message"]["content"]
        complete += check(
            ask(running, body(seed, tool_choice="required", temperature=temperature, max_tokens=200)), seed
        )
    assert complete >= SCHEMAS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strict_calls_are_what_their_schemas_say(running: Cluster, temperature: float) -> None:
    for seed in range(SCHEMAS):
        begins = {str(MARKER_ID): 100.0}  # what a model does that means to call
        asked = body(seed, temperature=temperature, logit_bias=begins, parallel_tool_calls=False)
        choice = ask(running, asked)
        assert check(choice, seed) == len(calls_of(choice)) == 1 and choice["finish_reason"] == "tool_calls"
    free = ask(running, body(0, temperature=temperature, max_tokens=24, logit_bias={str(MARKER_ID): -100.0}))
    assert free["message"]["content"] and not calls_of(free)


def test_forced_calls_that_are_not_strict_are_objects(running: Cluster) -> None:
    for seed in range(SCHEMAS):
        named = {"type": "function", "function": {"name": f"tool_{seed}"}}
        choice = ask(running, {**body(seed, tool_choice=named, max_tokens=100), "tools": [tool(seed, strict=False)]})
        ((_, given),) = calls_of(choice)
        assert given.startswith("{")
        if choice["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(given), dict)


def test_a_schema_that_does_not_compile_is_named(running: Cluster) -> None:
    bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    tools = [tool(0), {"type": "function", "function": {"name": "h", "strict": True, "parameters": bad}}]
    refused = httpx.post(running.url + "/v1/chat/completions", json={**body(0), "tools": tools}, timeout=60)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "tools", error
    assert error["message"].startswith("tools.1.function.parameters cannot be served: ")
