"""What clients get when something fails: never a success, always the envelope or an error event, and no work left."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from tandem.config import RouterConfig
from tandem.errors import BadRequest, ContextTooLong, Overloaded, Unavailable

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("too many requests"), 429, "overloaded"),
        (Unavailable("no worker"), 503, "unavailable"),
        (ContextTooLong("too long", "prompt"), 400, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_comes_before_any_header(
    client: httpx.AsyncClient, world: Any, error: Exception, status: int, code: str, stream: bool
) -> None:
    world.dispatcher.refuse = error
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == str(error)
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_a_workers_refusal_names_the_clients_own_fields(client: httpx.AsyncClient, world: Any) -> None:
    for error, asked, param in (
        (BadRequest("the regex cannot be served", "response_format"), {"guided_regex": "("}, "guided_regex"),
        (
            BadRequest("the json_schema cannot be served", "response_format"),
            {"response_format": {"type": "text"}, "structured_outputs": {"json": {}}},
            "structured_outputs",
        ),
        (BadRequest("tools cannot be served", "tools"), {"regex": "a"}, "tools"),
        (ContextTooLong("too long", "prompt"), {}, "messages"),
    ):
        world.dispatcher.refuse = error
        response = await client.post("/v1/chat/completions", json={**CHAT, **asked})
        assert response.status_code == 400 and response.json()["error"]["param"] == param


async def test_a_fault_is_named_briefly(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, "logit_bias": {"x" * 10_000: "no number"}})
    assert response.status_code == 400 and response.json()["error"]["param"] == "logit_bias"
    assert len(response.json()["error"]["message"]) < 200


async def test_a_lost_worker_is_a_502(client: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.fail_after = 2
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 502
    assert response.json()["error"] == {
        "message": "the decode worker died", "type": "worker_lost", "param": None, "code": "worker_lost",
    }  # fmt: skip
    assert world.metric("tandem_requests_total", endpoint="chat", outcome="failed") == 1
    assert world.metric("tandem_request_failures_total", kind="worker_lost") == 1
    assert world.dispatcher.accepted[0].closed


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_lost_worker_ends_a_stream_with_an_error_event(
    client: httpx.AsyncClient, world: Any, path: str
) -> None:
    world.dispatcher.fail_after = 2
    asked = CHAT if path.endswith("chat/completions") else {"prompt": ["Hi", "Ho"]}
    response = await client.post(path, json={**asked, "stream": True})
    last = response.text.rstrip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "worker_lost"
    assert "[DONE]" not in response.text
    assert all(accepted.closed for accepted in world.dispatcher.accepted)
    assert all(accepted.cancelled.is_set() for accepted in world.dispatcher.accepted)
    assert world.metric("tandem_requests_running") == 0


async def test_one_refused_prompt_takes_back_the_others(client: httpx.AsyncClient, world: Any) -> None:
    submit, seen = world.dispatcher.submit, []

    async def second_is_refused(request: Any) -> Any:
        seen.append(request)
        if len(seen) == 2:
            raise Overloaded("full")
        return await submit(request)

    world.dispatcher.submit = second_is_refused
    response = await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert all(accepted.cancelled.is_set() for accepted in world.dispatcher.accepted)


async def test_a_stream_that_ends_silently_is_an_error(client: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.drop_after = 2
    whole = await client.post("/v1/chat/completions", json=CHAT)
    assert whole.status_code == 502
    streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert "unfinished" in streamed.text
    assert "[DONE]" not in streamed.text


async def test_a_gap_in_the_tokens_is_an_error(client: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.skip_at = 2
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert world.dispatcher.accepted[0].cancelled.is_set()


async def test_defects_are_answered_without_their_details(
    client: httpx.AsyncClient, world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Any, choice: int) -> list[int]:
        raise RuntimeError("secret at 0x7f00")

    world.dispatcher.script = broken
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert world.metric("tandem_requests_total", endpoint="chat", outcome="failed") == 1


async def test_a_template_refusal_names_the_messages(client: httpx.AsyncClient, world: Any) -> None:
    world.text.tokenizer._wrapped.chat_template, kept = (
        "{{ raise_exception('only users may speak') }}", world.text.tokenizer._wrapped.chat_template,
    )  # fmt: skip
    try:
        response = await client.post("/v1/chat/completions", json=CHAT)
    finally:
        world.text.tokenizer._wrapped.chat_template = kept
    assert response.status_code == 400
    assert "only users may speak" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "messages"


async def test_a_client_that_is_cut_before_the_first_token_leaves_no_work(world: Any) -> None:
    """Each choice of a chat starts with an event of its own; they must not fill the buffer before the work is owned."""

    config = RouterConfig(stream_queue=1)
    api = Api(config, world.dispatcher, world.source, RouterMetrics(), world.stories, world.callers)
    app = create_app(config, api)
    body = json.dumps({**CHAT, "n": 3, "stream": True}).encode()
    asked = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        return next(asked, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        """Takes anything."""

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    (accepted,) = world.dispatcher.accepted
    assert accepted.closed and accepted.cancelled.is_set()
