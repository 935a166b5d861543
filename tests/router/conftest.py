"""A router application over a scripted cluster and a tiny tokeniser."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from router.admission.callers import Callers
from router.admission.quota import Quotas
from router.explain.recorder import Recorder
from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from router.requests.defaults import GenerationDefaults
from tandem.config import RouterConfig
from tandem.testing.router import FakeDispatcher
from tandem.testing.tokenizer import END, byte_level_tokenizer
from tandem.text.prompt import PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.types import GenerateRequest, ModelInfo


class OneText:
    """A `TextSource` with one tokeniser."""

    def __init__(self, text: PromptTokenizer) -> None:
        self.text = text
        self.recommended = GenerationDefaults()

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        return self.text

    async def defaults(self, model: ModelInfo) -> GenerationDefaults:
        return self.recommended


def recorder() -> Recorder:
    return Recorder(64, 1 << 20, 60.0, time.monotonic)


@dataclass
class World:
    """All parts of a router under test."""

    config: RouterConfig
    tokenizer: Tokenizer
    text: PromptTokenizer
    dispatcher: FakeDispatcher
    metrics: RouterMetrics
    source: OneText
    stories: Recorder
    callers: Callers
    app: FastAPI
    answers: list[str]
    """What the model says, by choice; the last one repeats. `<|end|>` is sampled after it."""

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer())


def build_world(tokenizer: Tokenizer, context: int = 512, **settings: Any) -> World:
    """context: of the model, in tokens. settings: those of the router that matter to the test."""
    end = tokenizer.encode(END)[0]
    info = ModelInfo("tiny", "/tiny", "f" * 32, tokenizer.size, context, (end,))
    answers = ["Hello, world! 🙂"]

    def script(request: GenerateRequest, choice: int) -> list[int]:
        return [*tokenizer.encode(answers[min(choice, len(answers) - 1)]), end]

    config = RouterConfig(max_body_mib=1.0, **settings)
    text = PromptTokenizer(tokenizer)
    dispatcher = FakeDispatcher(info, script)
    metrics = RouterMetrics()
    stories, callers = recorder(), Callers(Quotas("r", time.monotonic))
    source = OneText(text)
    app = create_app(config, Api(config, dispatcher, source, metrics, stories, callers))
    return World(config, tokenizer, text, dispatcher, metrics, source, stories, callers, app, answers)


@pytest.fixture
def world(tokenizer: Tokenizer) -> World:
    return build_world(tokenizer)


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    """`build_world`, for tests with tokenisers and settings of their own."""
    return build_world


@pytest_asyncio.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client
