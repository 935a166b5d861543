"""What clients can get wrong: refused at once by a real cluster in OpenAI's envelope, and the next request works."""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
VOCAB, CONTEXT = 400, 512
MANY = 1_000_000
PATIENCE_S = 20.0
"""For one answer. All come at once; this only bounds how long a hanging one holds the tests."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One router, one prefill and one decode worker; checked for leaks at its end."""
    spec = CheckpointSpec(layers=2, vocab=VOCAB, max_positions=CONTEXT, seed=3)
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", spec)
    with cluster(model, tmp_path_factory.mktemp("logs"), worker_args=["--kv-mib", "4"]) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture(autouse=True)
def the_next_request_works(client: httpx.Client) -> Iterator[None]:
    yield
    answer = client.post(COMPLETION, json={"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def check(answer: httpx.Response, says: str, param: str | None = None, status: int = 400) -> None:
    """The envelope, whole and with one line that matches `says`."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) == 32
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert re.search(says, error["message"]), error["message"]


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETION, {"prompt": "hi", "max_tokens": 1} | fields


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | fields


def turn(**fields: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[fields])


LONG = [1] * (CONTEXT + 88)
REFUSED: dict[str, tuple[tuple[str, dict[str, Any]], str, str | None]] = {
    "empty text": (completion(prompt=""), "prompt is empty; at least 1 token", "prompt"),
    "empty list": (completion(prompt=[]), "prompt is empty; at least 1 token", "prompt"),
    "empty text in a list": (completion(prompt=["hi", ""]), "prompt is empty", "prompt"),
    "empty ids in a list": (completion(prompt=[[]]), r"prompt\[0\] must be .* non-empty list of token ids", "prompt"),
    "no prompt": ((COMPLETION, {}), "prompt is required", "prompt"),
    "no messages": ((CHAT, {}), "messages is required", "messages"),
    "empty messages": (chat(messages=[]), "messages: .* at least 1 item", "messages"),
    "ids too long": (completion(prompt=LONG), f"prompt has 600 tokens, .* {CONTEXT} tokens", "prompt"),
    "text too long": (completion(prompt="ab" * 600), rf"prompt has \d+ tokens, .* {CONTEXT} tokens", "prompt"),
    "chat too long": (
        turn(role="user", content="z" * 600),
        rf"messages has 604 tokens, .* {CONTEXT} tokens",
        "messages",
    ),
    "no room for an answer": (completion(prompt=[1] * CONTEXT), f"{CONTEXT} tokens.* at least 1 .* output", "prompt"),
    "answer too long": (
        completion(prompt=[1] * 500, max_tokens=100),
        f"{CONTEXT} tokens; prompt has 500 and max_tokens is 100, 600 together",
        "max_tokens",
    ),
    "streamed too long": (completion(prompt=LONG, stream=True), "prompt has 600 tokens", "prompt"),
    "id out of the vocabulary": (completion(prompt=[VOCAB]), "token id 400; ids are 0 to 399", "prompt"),
    "negative id": (completion(prompt=[1, -1]), "token id -1; ids are 0 to 399", "prompt"),
    "huge id": (completion(prompt=[1 << 70]), "token id 1180591620717411303424; ids are 0 to 399", "prompt"),
    "stop id out of the vocabulary": (
        completion(stop_token_ids=[VOCAB]),
        "stop_token_ids has the token id 400; ids are 0 to 399",
        "stop_token_ids",
    ),
    "negative stop id": (completion(stop_token_ids=[-1]), "greater than or equal to 0", "stop_token_ids"),
    "too many stop ids": (completion(stop_token_ids=[1] * 65), "at most 64 items", "stop_token_ids"),
    "biased id out of the vocabulary": (
        chat(logit_bias={str(VOCAB): 1}),
        "logit_bias has the token id 400; ids are 0 to 399",
        "logit_bias",
    ),
    "bias on no id": (chat(logit_bias={"hello": 1}), "logit_bias has the key 'hello'; keys must be", "logit_bias"),
    "bias too large": (chat(logit_bias={"1": 101}), r"logit_bias\[1\] is 101.0; .* \[-100, 100\]", "logit_bias"),
    "a billion choices": (completion(n=10**9), "n: .* less than or equal to 128", "n"),
    "no choice": (chat(n=0), "n: .* greater than or equal to 1", "n"),
    "more choices than prompts allow": (completion(prompt=["a"] * 100, n=128), "exceed 1024 choices", "n"),
    "best of fewer": (completion(best_of=2, n=3), "best_of is 2; it must be at least n, which is 3", "best_of"),
    "more top_logprobs": (chat(logprobs=True, top_logprobs=21), "less than or equal to 20", "top_logprobs"),
    "top_logprobs alone": (chat(top_logprobs=2), "top_logprobs needs logprobs", "top_logprobs"),
    "more logprobs": (completion(logprobs=21), "less than or equal to 20", "logprobs"),
    "empty stop": (completion(stop=["a", ""]), r"stop\[1\] has 0 characters; 1 to 1024", "stop"),
    "long stop": (completion(stop="x" * 1025), r"stop\[0\] has 1025 characters; 1 to 1024", "stop"),
    "many stops": (completion(stop=["x"] * 17), "stop has 17 strings; at most 16", "stop"),
    "more first tokens than tokens": (completion(min_tokens=2), r"min_tokens is 2; .* \[0, 1\]", "min_tokens"),
    "NUL in a prompt": (completion(prompt="a\0b"), r"prompt contains a NUL character \(U\+0000\) at index 1", "prompt"),
    "NUL in a message": (
        turn(role="user", content="a\0b"),
        r"messages.0.content contains a NUL character \(U\+0000\) at index 1",
        "messages.0.content",
    ),
    "lone surrogate": (completion(prompt="a\ud800b"), "not valid JSON", None),
    "lone low surrogate": (turn(role="user", content="a\udfff"), "not valid JSON", None),
    "no role": (turn(content="hi"), "messages.0.role is required", "messages"),
    "no content": (turn(role="user"), "messages.0.content is required", "messages"),
    "unknown role": (turn(role="wizard", content="hi"), "'wizard'; it must be system, .* or tool", "messages"),
    "an image": (turn(role="user", content=[{"type": "image_url"}]), "type 'image_url' are not supported", "messages"),
    "tools": (chat(tools=[{"type": "function"}]), r"tools\.0 must be", "tools"),
    "tools, but not in the template": (
        chat(tools=[{"type": "function", "function": {"name": "f"}}]),
        "template takes no tools",
        "tools",
    ),
    "a tool's result": (chat(messages=[{"role": "tool", "tool_call_id": "a", "content": "x"}]), "'tool'", "messages"),
    "a million ids": (completion(prompt=[1] * MANY), rf"1000000 tokens, .* {CONTEXT} tokens", "prompt"),
    "a million prompts": (completion(prompt=["a"] * MANY), "1000000 prompts; at most 128", "prompt"),
    "a million stops": (completion(stop=["a"] * MANY), "1000000 strings; at most 16", "stop"),
    "a million stop ids": (completion(stop_token_ids=[1] * MANY), "at most 64 items", "stop_token_ids"),
    "a million biases": (
        completion(logit_bias={str(key): 1 for key in range(MANY)}),
        "at most 1024 items",
        "logit_bias",
    ),
    "a million messages": (chat(messages=[{"role": "", "content": ""}] * (MANY // 4)), "at most 4096", "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(name: str, client: httpx.Client) -> None:
    (path, body), says, param = REFUSED[name]
    check(client.post(path, content=json.dumps(body)), says, param)


@pytest.mark.parametrize("make", [completion, chat])
def test_an_unknown_model_is_not_found(make: Any, client: httpx.Client) -> None:
    path, body = make(model="gpt-4")
    answer = client.post(path, json=body)
    check(answer, "the model 'gpt-4' is not served here; 'tiny' is", "model", 404)
    assert answer.json()["error"]["code"] == "model_not_found"


RANGES = {
    "temperature": (-0.1, 100.1),
    "top_p": (0, 1.1),
    "min_p": (-0.1, 1.1),
    "frequency_penalty": (-2.1, 2.1),
    "presence_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, 10.1),
}


@pytest.mark.parametrize("field", RANGES)
@pytest.mark.parametrize("make", [completion, chat])
def test_sampling_values_have_ranges(field: str, make: Any, client: httpx.Client) -> None:
    for value in RANGES[field]:
        path, body = make(**{field: value})
        check(client.post(path, json=body), rf"{field} is {value:g}.*; it must be in [(\[]", field)
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        path, body = make(**{field: "here"})
        check(client.post(path, content=json.dumps(body).replace('"here"', word)), f"{field}: .* finite", field)


NUMBERS: tuple[Any, ...] = ("1", True, [1], {"a": 1})
WHOLE: tuple[Any, ...] = (*NUMBERS, 1.5, 10**30)
FLAGS: tuple[Any, ...] = ("true", 1, [True])
WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(RANGES, NUMBERS),
    **dict.fromkeys(("n", "max_tokens", "top_k", "seed", "min_tokens", "prompt_logprobs", "priority"), WHOLE),
    **dict.fromkeys(("stream", "ignore_eos"), FLAGS),
    "model": (1, ["tiny"], {}),
    "stop": (1, {"a": 1}, ["a", 1], True),
    "stop_token_ids": (1, "1", ["1"], [1.5], [True], {"a": 1}),
    "logit_bias": (1, [1], {"1": "a"}, {"1": None}, "1"),
    "stream_options": (1, [1], {"include_usage": 1}),
    "cache_salt": (1, "", "x" * 257, ["a"]),
}
OWN_TYPES: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETION: {
        "prompt": (1, 1.5, True, {"a": 1}, None, [None], [1, "a"], [1.5], [True], [[1, [2]]], [[["a"]]]),
        "logprobs": WHOLE,
        "echo": FLAGS,
        "best_of": WHOLE,
    },
    CHAT: {
        "messages": (1, "hi", None, {"role": "user"}, [1], [[]], [None], [{"role": 1, "content": "hi"}]),
        "logprobs": (1, "true", [True]),
        "top_logprobs": WHOLE,
        "max_completion_tokens": (*WHOLE, 0, -1),
    },
}


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path in OWN_TYPES for field in (*WRONG_TYPES, *OWN_TYPES[path])]
)
def test_wrong_types_are_named(path: str, field: str, client: httpx.Client) -> None:
    _, body = completion() if path == COMPLETION else chat()
    for value in (WRONG_TYPES | OWN_TYPES[path])[field]:
        check(client.post(path, json=body | {field: value}), rf"^{field}\b", field)


BROKEN_JSON: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"prompt": "hi",}',
    b'{"prompt": "\xff"}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"prompt": "hi", "seed": ' + b"9" * 10_000 + b"}",
)


@pytest.mark.parametrize("path", [COMPLETION, CHAT, "/tokenize", "/detokenize"])
def test_broken_json_is_refused(path: str, client: httpx.Client) -> None:
    for body in BROKEN_JSON:
        check(client.post(path, content=body), "the body is not valid JSON: ")
    for body in (b"[]", b"1", b'"hi"', b"null"):
        check(client.post(path, content=body), "the body must be a JSON object")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/%ff%00", 404),
        ("GET", COMPLETION, 405),
        ("DELETE", CHAT, 405),
        ("PUT", "/v1/models", 405),
        ("POST", "/metrics", 405),
    ],
)
def test_unknown_routes_and_methods(method: str, path: str, status: int, client: httpx.Client) -> None:
    says = "there is no route /" if status == 404 else f"{method} is not allowed on {path}"
    check(client.request(method, path), says, status=status)


def test_an_unknown_model_card_is_not_found(client: httpx.Client) -> None:
    check(client.get("/v1/models/none"), "the model 'none' is not served here", "model", 404)


@pytest.mark.parametrize(
    ("path", "body", "says", "param"),
    [
        ("/tokenize", {}, "exactly one of prompt and messages", "prompt"),
        ("/tokenize", {"prompt": 5}, "^prompt: ", "prompt"),
        ("/tokenize", {"prompt": "a\0"}, "NUL", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "exactly one", "prompt"),
        ("/tokenize", {"messages": []}, "at least 1 item", "messages"),
        ("/detokenize", {}, "tokens is required", "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens has the id 400; ids are 0 to 399", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0", "tokens"),
        ("/detokenize", {"tokens": "1"}, "^tokens: ", "tokens"),
    ],
)
def test_the_tokenizer_routes_refuse(path: str, body: Any, says: str, param: str, client: httpx.Client) -> None:
    check(client.post(path, json=body), says, param)


HUGE = 100_000_000
LIMIT = 16 << 20


def connect(running: Cluster, *headers: str) -> socket.socket:
    """A connection on which the head of a completion was sent."""
    made = socket.create_connection(("127.0.0.1", running.router.port), timeout=PATIENCE_S)
    lines = (f"POST {COMPLETION} HTTP/1.1", "host: tandem", "content-type: application/json", *headers, "", "")
    made.sendall("\r\n".join(lines).encode())
    return made


def refusal(connection: socket.socket) -> dict[str, Any]:
    """The error of a 413 that came although the body had not."""
    with connection, connection.makefile("rb") as answer:
        status = answer.readline()
        assert status.startswith(b"HTTP/1.1 413 "), status
        headers = dict(line.decode().lower().strip().split(": ", 1) for line in iter(answer.readline, b"\r\n"))
        assert headers["connection"] == "close"
        return dict(json.loads(answer.read(int(headers["content-length"])))["error"])


@pytest.mark.parametrize("expect", [(), ("expect: 100-continue",)])
def test_a_body_said_to_be_huge_is_refused_before_it_comes(running: Cluster, expect: tuple[str, ...]) -> None:
    error = refusal(connect(running, f"content-length: {HUGE}", *expect))
    assert error["message"] == f"the body has {HUGE} bytes; at most {LIMIT} are allowed"
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")


def test_a_huge_body_of_unknown_length_is_refused_while_it_comes(running: Cluster) -> None:
    connection = connect(running, "transfer-encoding: chunked")
    chunk, sent = b"10000\r\n" + b" " * (1 << 16) + b"\r\n", 0
    while not select.select([connection], [], [], 0)[0]:
        assert sent < HUGE, "all of it was read"
        connection.sendall(chunk)
        sent += 1 << 16
    assert sent > LIMIT
    assert refusal(connection)["message"].startswith(f"the body has more than {LIMIT} bytes")


def test_a_client_that_sends_a_huge_body_anyway_gets_the_answer(client: httpx.Client) -> None:
    answer = client.post(COMPLETION, content=b" " * (LIMIT + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
