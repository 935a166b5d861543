"""HTTP itself: methods, pages of other origins, and sampling defaults that the model brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from router.requests.defaults import GenerationDefaults, read_defaults
from router.requests.texts import ModelTexts
from tandem.config import RouterConfig
from tandem.errors import BadRequest
from tandem.types import ModelInfo

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PAGE = "https://chat.example"


def at(world: Any, **settings: Any) -> httpx.AsyncClient:
    """A client of the world's router under other settings."""
    config = RouterConfig(**settings)
    api = Api(config, world.dispatcher, world.source, RouterMetrics(), world.stories, world.callers)
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(config, api)), base_url="http://router")


async def test_other_methods_are_refused_in_the_envelope(client: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("OPTIONS", "/v1/chat/completions", 405), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404), ("GET", "/docs", 404), ("GET", "/v1", 404),
    ):  # fmt: skip
        response = await client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert path in response.json()["error"]["message"]
        assert ("allow" in response.headers) == (status == 405)


async def test_head_is_get_without_its_body(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/v1/models", "/v1/models/tiny", "/metrics"):
        assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


@pytest.mark.parametrize(("origins", "told"), [((), None), ((PAGE,), PAGE), (("https://other",), None), (("*",), "*")])
async def test_pages_of_allowed_origins_may_call(origins: tuple[str, ...], told: str | None, world: Any) -> None:
    async with at(world, cors_origins=origins) as client:
        for body, status in ((CHAT, 200), ({**CHAT, "stream": True}, 200), ({}, 400)):
            answer = await client.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == told
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-own"}
        preflight = await client.options("/v1/chat/completions", headers={"origin": PAGE, **asked})
        assert (preflight.status_code == 200) == (told is not None)
        if told is not None:
            assert preflight.headers["access-control-allow-headers"].replace(" ", "") == "authorization,x-own"


async def test_the_models_defaults_hold_where_the_client_says_nothing(client: httpx.AsyncClient, world: Any) -> None:
    world.source.recommended = GenerationDefaults(0.6, 0.9, 20, 0.05, 1.1, max_new_tokens=7)
    asked = {"temperature": 0, "top_p": 1.0, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 9}
    for path, prompt, usual in (
        ("/v1/chat/completions", CHAT, 7), ("/v1/completions", {"prompt": "Hi"}, 16),
    ):  # fmt: skip
        for body, expected in (
            ({}, (0.6, 0.9, 20, 0.05, 1.1, usual)),
            (dict.fromkeys(asked), (0.6, 0.9, 20, 0.05, 1.1, usual)),
            (asked, (0.0, 1.0, 0, 0.0, 1.0, 9)),
            ({"temperature": 0.2}, (0.2, 0.9, 20, 0.05, 1.1, usual)),
        ):
            assert (await client.post(path, json={**prompt, **body})).status_code == 200
            got = world.dispatcher.requests[-1].sampling
            found = (got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty, got.max_tokens)
            assert found == expected, (path, body)


def test_defaults_are_read_and_what_is_out_of_range_is_logged(tmp_path: Path, caplog: Any) -> None:
    assert read_defaults(tmp_path) == GenerationDefaults()
    for text, expected, logged in (
        ('{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": true}',
         GenerationDefaults(0.7, 0.8, 20, None, 1.05), ""),
        ('{"do_sample": false, "temperature": null, "eos_token_id": [2], "max_new_tokens": 99}',
         GenerationDefaults(max_new_tokens=99), ""),
        ('{"temperature": -1, "top_k": 2.5, "top_p": 0.5, "max_new_tokens": 0, "min_p": true}',
         GenerationDefaults(top_p=0.5), "temperature is -1"),
        ("{", GenerationDefaults(), "cannot be read as JSON"),
        ("[]", GenerationDefaults(), ""),
    ):  # fmt: skip
        caplog.clear()
        (tmp_path / "generation_config.json").write_text(text)
        assert read_defaults(tmp_path) == expected
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert bool(errors) == bool(logged) and all(logged in errors[0] for _ in errors[:1])


@pytest.mark.parametrize(("use", "temperature"), [(True, 0.25), (False, None)])
async def test_the_setting_decides_whether_the_file_counts(
    use: bool, temperature: float | None, tmp_path: Path, world: Any
) -> None:
    world.tokenizer._wrapped.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
    texts = ModelTexts(None, use)
    model = ModelInfo("tiny", str(tmp_path), "f" * 32, 400, 512)
    assert (await texts.defaults(model)).temperature == temperature
    assert (await texts.get(model)).tokenizer.size == world.tokenizer.size


def test_the_setting_has_two_values() -> None:
    assert RouterConfig().generation_config == "auto"
    with pytest.raises((ValueError, BadRequest), match="generation_config"):
        RouterConfig(generation_config="vllm")
