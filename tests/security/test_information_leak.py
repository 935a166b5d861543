"""CVE-2026-22778: what errors say helps nobody to find memory, files, hosts or processes."""

from __future__ import annotations

import re
import socket
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import BadRequest, Internal, TandemError, Unavailable, WorkerLost, without_internals
from tests.security.rig import Front

HOST = socket.gethostname()
TELLTALE = re.compile(
    r"0x[0-9a-fA-F]{5,}|Traceback|File \"|line \d+, in|/(?:home|root|usr|tmp|models|work|etc|opt)/"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|site-packages|object at|localhost"
)
RAISED: tuple[Exception, ...] = (
    RuntimeError("<Engine object at 0x7f3a2b1c9d00> failed in /home/serving/tandem/engine.py"),
    KeyError("/models/secret/weights.safetensors"),
    Unavailable("failed to connect to all addresses; last error: UNKNOWN: ipv4:10.1.2.3:50051: Connection refused"),
    Unavailable("the tokeniser cannot be loaded: /models/secret-folder/tiny/tokenizer.json is not valid"),
    Unavailable("worker node-7.cluster.local:9000 does not answer"),
    WorkerLost("[fe80::1ff:fe23:4567:890a]:8443 is gone: unix:/tmp/tandem-router-x/control-1"),
    Internal('Traceback (most recent call last):\n  File "/usr/lib/python3.11/asyncio/tasks.py", line 1, in f\nX'),
    BadRequest("the chat template refused the messages: <LoopContext object 0x7f12ab34cd56> is undefined"),
    OSError(2, "No such file", "/etc/shadow"),
)  # fmt: skip
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_inside_are_not_told(
    error: Exception, stream: bool, anyone: httpx.AsyncClient, opened: Front
) -> None:
    opened.dispatcher.refuse = error  # type: ignore[assignment]
    for path, body in PATHS.items():
        answer = await anyone.post(path, json={**body, "stream": stream})
        assert answer.status_code >= 400
        said = answer.json()["error"]["message"]
        assert not TELLTALE.search(said), said
        assert said and "\n" not in said and len(said) <= 400


WORDS = st.sampled_from(
    ["/tmp/a/b", "10.0.0.1:80", "[::1]:443", "0x7fffdeadbeef", "node-1:9000", "/var/x/y.py", "a", " "]
)


@given(st.lists(WORDS, max_size=6), st.sampled_from([Unavailable, WorkerLost, Internal, TandemError]))
def test_no_text_of_a_server_error_names_a_place(words: list[str], kind: type[TandemError]) -> None:
    said = without_internals(kind(" ".join(words)))
    assert not re.search(r"/tmp|/var|\d:\d|0x7f|:9000|10\.0", said), said


@pytest.mark.parametrize(
    "place",
    [
        "ipv6:%5B::1%5D:4000", "ipv6:%5Bfe80::1%25eth0%5D:4000", "ipv6:%5b::ffff:10.0.0.1%5d:80", "[fe80::1%eth0]:443",
        "::1", "fe80::1ff:fe23:4567:890a", "2001:4860:4860::8888", "ipv6:fd00::", "fe80::1%eth0", "::ffff:10.0.0.1",
        "2001:db8:0:1:1:1:1:1", "10.0.0.1:80", "ipv4:10.0.0.1:80", "node-7.cluster.local:9000",
    ],
)  # fmt: skip
def test_an_address_is_left_out_however_it_is_written(place: str) -> None:
    for text in ("{} is gone", "last error: UNKNOWN: {}: refused", "lost ({})"):
        assert without_internals(WorkerLost(text.format(place))) == text.format("?")


def test_texts_of_the_tree_stay_readable() -> None:
    for text in (
        "the std::move failed",
        "no decode worker can take a request",
        "the queue is full: 256 wait; at most 256 may",
        "n is 3",
    ):
        assert without_internals(Unavailable(text)) == text
    told = BadRequest("there is no route /v1/nothing/here")
    assert without_internals(told) == str(told)
    assert len(without_internals(Internal("x" * 10_000))) == 400


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/docs", "/redoc", "/.env", "/server-status"]
)
async def test_nothing_else_is_served(path: str, anyone: httpx.AsyncClient) -> None:
    answer = await anyone.get(path)
    assert answer.status_code == 404 and "root:" not in answer.text and HOST not in answer.text
    assert "server" not in answer.headers and "x-powered-by" not in answer.headers
