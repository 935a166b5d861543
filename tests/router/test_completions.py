"""`/v1/completions` beyond plain text: the echo with log-probabilities, prompts that are only scored, the best of."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from router.requests import job
from router.requests.echo import echo_of, token_offsets
from tandem.testing.tokenizer import END
from tandem.types import GenerateRequest, TokenLogprob

PATH = "/v1/completions"
TEXT = "Hello, wörld! 🙂 yes"


def events(response: httpx.Response) -> list[Any]:
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def joined(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A streamed choice's log-probabilities in one piece."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in (part["choices"][0]["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    return found


async def test_an_echo_with_logprobs_has_those_of_the_prompt_in_front(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["The cat"]
    prompt = world.tokenizer.encode(TEXT, add_special_tokens=True)
    for given in (TEXT, prompt):
        asked = {"prompt": given, "echo": True, "logprobs": 2, "max_tokens": 2}
        (choice,) = (await client.post(PATH, json=asked)).json()["choices"]
        assert choice["text"].startswith(TEXT)
        assert "prompt_logprobs" not in choice
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(prompt) + 2}
        assert found["token_logprobs"] == [None, *[-1.0] * (len(prompt) - 1), -0.5, -0.5]
        assert found["top_logprobs"][0] is None
        assert all(
            logprob == top[token] for token, logprob, top in list(zip(*list(found.values())[:3], strict=True))[1:]
        )
        assert found["text_offset"] == sorted(found["text_offset"])
        assert found["text_offset"][len(prompt)] == len(TEXT)
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert "\ufffd" in token or choice["text"].startswith(token, offset)
        got = events(await client.post(PATH, json={**asked, "stream": True}))
        assert joined(got) == found
        assert "".join(each["choices"][0]["text"] for each in got) == choice["text"]
    assert {request.sampling.prompt_logprobs for request in world.dispatcher.requests} == {2}


async def test_no_output_scores_each_prompt_and_ends(client: httpx.AsyncClient, world: Any) -> None:
    asked = {"prompt": ["Hello", "The cat sat"], "echo": True, "logprobs": 0, "max_tokens": 0, "n": 2}
    body = (await client.post(PATH, json=asked)).json()
    assert [choice["text"] for choice in body["choices"]] == ["Hello"] * 2 + ["The cat sat"] * 2
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert [request.sampling.max_tokens for request in world.dispatcher.requests] == [0, 0]
    for choice, request in zip(body["choices"], [r for r in world.dispatcher.requests for _ in range(2)], strict=True):
        assert choice["logprobs"]["token_logprobs"] == [None, *[-1.0] * (len(request.prompt) - 1)]
        assert len(choice["logprobs"]["top_logprobs"][1]) == 1, "the token itself"
    assert body["usage"]["completion_tokens"] == 0
    got = events(await client.post(PATH, json={**asked, "stream": True}))
    for index, text in enumerate(["Hello"] * 2 + ["The cat sat"] * 2):
        mine = [each for each in got if each["choices"][0]["index"] == index]
        assert "".join(each["choices"][0]["text"] for each in mine) == text
        assert joined(mine) == body["choices"][index]["logprobs"]
        assert [each["choices"][0]["finish_reason"] for each in mine] == [None, "length"]


async def test_echoed_scores_are_bounded_over_all_choices(
    client: httpx.AsyncClient, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompt": [[5] * 10, [5] * 20], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 3}
    values = (10 + 20) * 3 * 2
    for limit, more, status in (
        (values, {}, 200), (values - 1, {}, 400), (values - 1, {"best_of": 4}, 400), (values - 1, {"n": 2}, 200),
        (values - 1, {"logprobs": 0}, 200), (0, {"logprobs": None}, 200), (0, {"echo": False}, 200),
    ):  # fmt: skip
        monkeypatch.setattr(job, "MAX_ECHOED", limit)
        world.dispatcher.requests.clear()
        response = await client.post(PATH, json={**asked, **more})
        assert response.status_code == status, (limit, more)
        assert bool(world.dispatcher.requests) == (status == 200)
        if status == 400:
            error = response.json()["error"]
            assert error["param"] == "logprobs" and str(limit) in error["message"]


async def test_a_prompt_may_fill_the_context_when_no_output_is_wanted(client: httpx.AsyncClient) -> None:
    for tokens, limit, status in ((512, 0, 200), (513, 0, 400), (512, 1, 400), (511, 1, 200)):
        response = await client.post(PATH, json={"prompt": [5] * tokens, "max_tokens": limit})
        assert response.status_code == status, (tokens, limit)
        if status == 400:
            error = response.json()["error"]
            assert error["param"] == "prompt" and error["code"] == "context_length_exceeded"
            assert str(tokens) in error["message"] and "512" in error["message"]


async def test_both_forms_of_prompt_logprobs_can_be_asked_for(client: httpx.AsyncClient, world: Any) -> None:
    asked = {"prompt": "Hello", "echo": True, "logprobs": 0, "prompt_logprobs": 3, "max_tokens": 1}
    (choice,) = (await client.post(PATH, json=asked)).json()["choices"]
    assert world.dispatcher.requests[0].sampling.prompt_logprobs == 3
    assert len(choice["prompt_logprobs"]) == len(world.dispatcher.requests[0].prompt)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (len(choice["prompt_logprobs"]))


async def test_best_of_answers_with_the_likeliest(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["one", "two", "three", "four"]
    likely = [-2.0, -0.1, -3.0, -0.5]

    class Scored(type(world.dispatcher)):  # type: ignore[misc]
        async def submit(self, request: GenerateRequest) -> Any:
            accepted = await super().submit(request)
            made = accepted._delta

            def scored(choice: int, step: int) -> Any:
                delta = made(choice, step)
                (each,) = delta.logprobs
                object.__setattr__(delta, "logprobs", (TokenLogprob(each.token, likely[choice], each.top),))
                return delta

            accepted._delta = scored
            return accepted

    world.dispatcher.__class__ = Scored
    asked: dict[str, Any] = {"prompt": ["Hello", "Bye"], "n": 2, "best_of": 4, "max_tokens": 20}
    body = (await client.post(PATH, json=asked)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "two"), (1, "four"), (2, "two"), (3, "four"),
    ]  # fmt: skip
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert {(request.choices, request.sampling.logprobs) for request in world.dispatcher.requests} == {(4, 0)}
    whole = sum(len(world.tokenizer.encode(text)) + 1 for text in world.answers)
    assert body["usage"]["completion_tokens"] == 2 * whole, "all that was made is counted"
    scored = (await client.post(PATH, json={**asked, "logprobs": 1, "echo": True})).json()["choices"]
    assert [choice["text"] for choice in scored] == ["Hellotwo", "Hellofour", "Byetwo", "Byefour"]
    assert [choice["logprobs"]["token_logprobs"][-1] for choice in scored] == [-0.1, -0.5] * 2
    told = (await client.post(PATH, json={**asked, "prompt_logprobs": 0})).json()["choices"]
    prompts = [len(request.prompt) for request in world.dispatcher.requests[-2:]]
    assert [len(choice.get("prompt_logprobs", ())) for choice in told] == [prompts[0], 0, prompts[1], 0]


async def test_usage_so_far_comes_with_every_chunk_that_is_to_have_it(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"prompt": "Hello", "stream": True, "stream_options": options}
    counts = [each["usage"]["completion_tokens"] for each in events(await client.post(PATH, json=asked))]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == counts[-2] > 3


@pytest.mark.parametrize("text", ["Hello", f"{END}Hello{END} yes\n🙂🙂", "ä" * 3000])
async def test_offsets_are_where_the_tokens_stand(text: str, world: Any) -> None:
    ids = world.tokenizer.encode(text, add_special_tokens=True)
    echo = await echo_of(text, ids, world.tokenizer, True)
    assert echo.text == text
    assert echo.offsets == token_offsets(text, ids, world.tokenizer)
    spelled = 0
    for token, offset in zip(ids, echo.offsets, strict=True):
        spelling = world.tokenizer.token_bytes(token).decode(errors="replace")
        if text.startswith(spelling, offset):
            spelled += len(spelling)
    assert spelled >= len(text.replace("🙂", "").replace("ä", "")), "every token that is whole text stands there"
    assert (await echo_of(ids, ids, world.tokenizer, False)).offsets is None
