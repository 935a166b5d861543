"""CVE-2025-62426, CVE-2025-61620, CVE-2026-5760: templates that reach out of their sandbox, or never end."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from jinja2 import Environment, FileSystemLoader
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import BadRequest
from tandem.testing.tokenizer import byte_level_tokenizer
from tandem.text import tokenizer as tokenizer_module
from tandem.text.time_limit import TooLong, within
from tandem.text.tokenizer import Tokenizer
from tests.security.rig import Front

MESSAGES = [{"role": "user", "content": "hi"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
SHELL = "os.system('touch FOLDER/canary')"
CLASSES = "{0.__class__.__mro__}"
ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "base": "{{ messages.__class__.__base__ }}",
    "own globals": "{{ self.__init__.__globals__ }}",
    "namespace": "{% set x = namespace() %}{{ x.__class__.__mro__ }}",
    "attr filter": "{{ ('%s' | attr('__class__')).__mro__ }}",
    "item": "{{ messages['__class__'].__mro__ }}",
    "format": "{{ '" + CLASSES + "'.format(messages) }}",
    "format by filter": "{{ ('" + CLASSES + "' | attr('format'))(messages) }}",
    "format kept": "{% set f = '" + CLASSES + "'.format %}{{ f(messages) }}",
    "format_map": "{{ '{messages.__class__.__mro__}'.format_map({'messages': messages}) }}",
    "shell": "{{ cycler.__init__.__globals__." + SHELL + " }}",
    "shell of a function": "{{ lipsum.__globals__." + SHELL + " }}",
    "shell by items": "{{ joiner['__init__']['__globals__']." + SHELL + " }}",
    "builtins": "{{ lipsum.__globals__['__builtins__'].open('FOLDER/canary', 'w').close() }}",
    "include": "{% include 'FOLDER/secret' %}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='system') }}",
    "clear": "{{ messages[0].clear() }}",
    "range": "{{ range(200000) | join }}",
}
"""Templates that do harm outside a sandbox, each of which `harm` sees; FOLDER becomes one that they may write to."""
SECRET = "root:x:0:0"


def prepared(template: str, folder: Path) -> tuple[str, list[Any]]:
    """A template with something to steal, and messages of its own to change."""
    (folder / "secret").write_text(SECRET)
    return template.replace("FOLDER", str(folder)), copy.deepcopy(MESSAGES)


def harm(said: str, messages: list[Any], folder: Path) -> list[str]:
    """What a template did to whoever rendered it."""
    found = {
        "ran something": (folder / "canary").exists(),
        "saw Python's classes": "<class" in said,
        "read a file": SECRET in said,
        "changed the messages": messages != MESSAGES,
        "grew": len(said) > 100_000,
    }
    return [name for name, done in found.items() if done]


def with_template(template: str) -> Tokenizer:
    made = byte_level_tokenizer()
    made.chat_template = template
    return Tokenizer(made)


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_does_harm_where_there_is_no_sandbox(name: str, tmp_path: Path) -> None:
    """Or it would say nothing of the sandbox that it does none there."""
    template, messages = prepared(ESCAPES[name], tmp_path)
    plain = Environment(loader=FileSystemLoader("/"))  # noqa: S701 (chat templates escape nothing either)
    said = plain.from_string(template).render(messages=messages)
    assert harm(said, messages, tmp_path)


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_cannot_leave_the_sandbox(name: str, tmp_path: Path) -> None:
    template, messages = prepared(ESCAPES[name], tmp_path)
    with pytest.raises(BadRequest, match="the chat template refused the messages") as refused:
        with_template(template).render(messages)
    said = str(refused.value)
    assert not harm(said, messages, tmp_path) and len(said) < 400


def test_the_sandbox_is_the_immutable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = ImmutableSandboxedEnvironment.from_string

    def seen(self: Any, *args: Any, **named: Any) -> Any:
        made.append(type(self))
        return real(self, *args, **named)

    monkeypatch.setattr(ImmutableSandboxedEnvironment, "from_string", seen)
    with_template("{{ messages[0].content }} seen").render(MESSAGES)
    assert made and all(issubclass(kind, ImmutableSandboxedEnvironment) for kind in made)


async def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_S", 0.2)
    started = time.monotonic()
    with pytest.raises(BadRequest, match=r"the chat template took longer than 0\.2 seconds"):
        await with_template(ENDLESS).render_async(MESSAGES)
    assert time.monotonic() - started < 60  # it would take hours
    assert await with_template("{{ messages[0].content }}").render_async(MESSAGES) == "hi"


async def test_only_the_work_itself_is_interrupted() -> None:
    """What runs on the same thread afterwards is left alone, however near the end the time ran out."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    ended = interrupted = 0
    for number in range(300):
        # Around the moment at which the time is over; some end before it, some after.
        length = number * 40
        try:
            await within(0.0, lambda length=length: sum(each for each in range(length)))  # type: ignore[misc]
            ended += 1
        except TimeoutError:
            interrupted += 1
        assert await asyncio.to_thread(sum, range(200)) == 19900
    with pytest.raises(TimeoutError):
        await within(0.0, Endless())
    assert await asyncio.to_thread(sum, range(200)) == 19900
    assert ended + interrupted == 300 and ended, "no work ended by itself: nothing was tried near its end"


class Endless:
    """Work that only its time ends, or the test itself."""

    def __init__(self) -> None:
        self.begun, self.stopped, self.interrupted = (threading.Event() for _ in range(3))
        self.begins: Callable[[], object] = bool

    def __call__(self) -> None:
        try:
            self.begun.set()
            self.begins()
            while not self.stopped.is_set():
                pass
        except TooLong:
            self.interrupted.set()
            raise


async def test_the_time_goes_on_when_the_client_goes_away() -> None:
    work = Endless()
    waiter = asyncio.create_task(within(0.2, work))
    loop = asyncio.get_running_loop()
    work.begins = lambda: loop.call_soon_threadsafe(waiter.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiter
    try:
        assert await asyncio.to_thread(work.interrupted.wait, 20)
    finally:
        work.stopped.set()


async def test_the_time_begins_with_the_work() -> None:
    """The limit would be over before a thread is free."""
    work, free = Endless(), threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    busy = loop.run_in_executor(None, free.wait)
    waiter = asyncio.create_task(within(0.05, work))
    loop.call_soon(loop.call_later, 0.1, free.set)
    try:
        done, _ = await asyncio.wait([waiter], timeout=20)
        assert done and work.interrupted.is_set()
        with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
            await waiter
    finally:
        work.stopped.set()
        free.set()
        await busy


class SlowToBegin(ThreadPoolExecutor):
    """Its thread has taken the work, and has not begun it."""

    def __init__(self) -> None:
        super().__init__(1)
        self.taken, self.go_on = threading.Event(), threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """Executor"""

        def held() -> Any:
            self.taken.set()
            self.go_on.wait()
            return fn(*args, **named)

        return super().submit(held)


async def test_work_that_nobody_waits_for_does_not_begin() -> None:
    work, executor = Endless(), SlowToBegin()
    work.stopped.set()
    asyncio.get_running_loop().set_default_executor(executor)
    waiter = asyncio.create_task(within(20.0, work))
    while not executor.taken.is_set():
        await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    executor.go_on.set()
    await asyncio.get_running_loop().run_in_executor(None, bool)  # the only thread has come past it
    assert not work.begun.is_set()


RESERVED = ("messages", "tokenize", "tools", "add_generation_prompt", "_x", "a.b", "return_dict", "bos_token")


@pytest.mark.parametrize("name", [*RESERVED, "raise_exception", "conversation", "chat_template"])
async def test_requests_cannot_replace_what_the_router_gives_the_template(
    name: str, anyone: httpx.AsyncClient, opened: Front
) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: True}}
    answer = await anyone.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert opened.dispatcher.requests == []


@pytest.mark.parametrize("name", ["chat_template", "chat_template_content_format"])
async def test_requests_bring_no_templates(name: str, anyone: httpx.AsyncClient, opened: Front) -> None:
    answer = await anyone.post("/v1/chat/completions", json={"messages": MESSAGES, name: "{{ 7 * 7 }}"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert opened.dispatcher.requests == []
