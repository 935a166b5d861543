"""The clients of a soak: eight ways to ask, and what each must be given for its answer to count as one.

An answer that ends cleanly but too early, is no valid JSON under a schema, or differs from what the same greedy prompt
was answered before, is *lost*: no client could notice. An error is one that a client is told. Whatever a client does
not foresee, such as an event that is no JSON, is lost too: it must not vanish with the task that met it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema

from tandem.testing.schemas import random_schema

log = logging.getLogger(__name__)

ANSWER_S = 90.0
"""A stream that has no end by then is lost."""
PATIENCE_S = 1.5
"""Who goes away does so within this."""
SLOW_READ_S = 0.05
STALL_S = 3.0
TURNS = 6
SHARED_PREFIXES = 4
WORDS_REMEMBERED = 12_000
KNOWN_PROMPTS = 12
MIXES: dict[str, dict[str, float]] = {
    "even": dict.fromkeys(("chat", "shared", "long", "grammar", "several", "leaves", "slow", "known"), 1.0),
    "chats": {"chat": 5, "shared": 2, "grammar": 1, "several": 1, "leaves": 1, "known": 1},
    "prompts": {"long": 4, "shared": 3, "known": 2, "leaves": 2, "chat": 1},
    "rude": {"leaves": 4, "slow": 3, "grammar": 2, "several": 2, "long": 1, "chat": 1, "known": 1},
}
"""How often each kind of request is drawn."""


@dataclass(frozen=True)
class End:
    """How one request ended: `answered`, `left` (its client did), `error` or `lost`."""

    kind: str
    outcome: str
    cause: str
    door: int
    """Which of the routers it came in by."""
    begun: float
    ended: float
    """On the clock `time.monotonic`."""


@dataclass
class Reply:
    """What a stream brought so far."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    done: bool = False
    error: str = ""

    def take(self, line: str) -> None:
        """One line of the event stream."""
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error = f"{event['error'].get('code')}: {event['error'].get('message', '')[:90]}"
            for choice in event.get("choices", ()):
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text
                if choice.get("finish_reason"):
                    self.finishes[choice["index"]] = choice["finish_reason"]


class Clients:
    """Draws requests and judges their ends.

    The seed decides what is drawn, but chats go on from what was answered, and how many there are to go on with
    depends on when: two runs of one seed are alike, not the same.
    """

    def __init__(self, urls: Sequence[str], model: str, mix: str, seed: int) -> None:
        # A small receive buffer lets a slow reader be slow for the router too.
        options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)]
        self._doors = [self._client(url, httpx.AsyncHTTPTransport(limits=httpx.Limits())) for url in urls]
        self._narrow = [self._client(url, httpx.AsyncHTTPTransport(socket_options=options)) for url in urls]
        self._model = model
        self._mix = MIXES[mix]
        self._source = random.Random(f"soak {mix} {seed}")
        self._chats: list[list[dict[str, str]]] = []
        self._shared = [self._words(250) for _ in range(SHARED_PREFIXES)]
        self._questions = [self._words(60) for _ in range(KNOWN_PROMPTS)]
        self._known: dict[str, str] = {}

    @staticmethod
    def _client(url: str, transport: httpx.AsyncHTTPTransport) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, timeout=ANSWER_S, transport=transport)

    async def close(self) -> None:
        """Closes all connections."""
        for client in (*self._doors, *self._narrow):
            await client.aclose()

    def _words(self, count: int) -> str:
        """Text that no cache has."""
        lengths = (self._source.randint(2, 8) for _ in range(count))
        return " ".join("".join(self._source.choices(string.ascii_lowercase, k=length)) for length in lengths)

    async def fill_word_caches(self) -> None:
        """Tokenisers remember how they cut words, the first ten thousand: 3 MiB, which chats take an hour to bring."""
        for client in self._doors:
            (await client.post("/tokenize", json={"prompt": self._words(WORDS_REMEMBERED)})).raise_for_status()

    # One request ----------------------------------------------------------------------------------------------------

    async def ask(self) -> End:
        """Draws a request, asks it at a router drawn at random, and judges its end."""
        (kind,) = self._source.choices(list(self._mix), list(self._mix.values()))
        door, begun = self._source.randrange(len(self._doors)), time.monotonic()
        try:
            outcome, cause = await self._outcome(kind, door)
        except Exception as error:
            log.exception("a client met what it does not foresee")
            outcome, cause = "lost", f"{type(error).__name__}: {str(error)[:90]}"
        return End(kind, outcome, cause, door, begun, time.monotonic())

    async def _outcome(self, kind: str, door: int) -> tuple[str, str]:
        """Asks; how it ended, and why so."""
        path, body, chat = self._draw(kind)
        leaves = self._source.uniform(0.0, PATIENCE_S) if kind == "leaves" else None
        stalls = kind == "slow" and self._source.random() < 0.3
        client = self._narrow[door] if kind == "slow" else self._doors[door]
        reply, outcome, cause = Reply(), "answered", ""
        try:
            async with asyncio.timeout(leaves if leaves is not None else ANSWER_S):
                cause = await self._read(client, path, body, reply, SLOW_READ_S if kind == "slow" else 0.0, stalls)
            if cause:
                outcome = "error"
            elif stalls:
                outcome = "left"
            elif cause := self._wrong(kind, body, reply):
                outcome = "lost"
        except TimeoutError:
            outcome, cause = ("left", "") if leaves is not None else ("lost", f"no end within {ANSWER_S:g} s")
        except (httpx.HTTPError, OSError) as error:
            outcome, cause = "error", type(error).__name__
        if chat is not None and outcome == "answered":
            self._chats.append([*chat, {"role": "assistant", "content": reply.texts[0]}])
        return outcome, cause

    async def _read(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], reply: Reply, pause_s: float, stalls: bool
    ) -> str:
        """Reads the stream to its end; the error that it told of."""
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return f"{answer.status_code} {answer.text[:120]}"
            async for line in answer.aiter_lines():
                reply.take(line)
                if stalls:
                    await asyncio.sleep(STALL_S)
                    return reply.error
                if pause_s and line:
                    await asyncio.sleep(pause_s)
        return reply.error

    def _wrong(self, kind: str, body: dict[str, Any], reply: Reply) -> str:
        """Why a clean end is none."""
        choices = body.get("n", 1)
        if not reply.done or len(reply.finishes) != choices:
            return f"a clean end with {len(reply.finishes)} of {choices} finish reasons"
        if body.get("ignore_eos") and set(reply.finishes.values()) != {"length"}:
            return f"ended by {sorted(set(reply.finishes.values()))}"
        if kind == "grammar" and reply.finishes[0] == "stop":
            try:
                jsonschema.validate(json.loads(reply.texts[0]), body["response_format"]["json_schema"]["schema"])
            except (ValueError, jsonschema.ValidationError) as error:
                return f"a text that its schema forbids: {type(error).__name__}"
        if kind == "known" and self._known.setdefault(body["prompt"], reply.texts[0]) != reply.texts[0]:
            return "another text than before"
        return ""

    # Requests -------------------------------------------------------------------------------------------------------

    def _draw(self, kind: str) -> tuple[str, dict[str, Any], list[dict[str, str]] | None]:
        """Path, body, and the chat that the answer continues."""
        body: dict[str, Any] = {"model": self._model, "stream": True, "temperature": 0, "max_tokens": 48}
        if kind == "chat":
            chat = self._turn()
            return "/v1/chat/completions", body | {"messages": chat, "ignore_eos": True}, chat
        if kind == "grammar":
            schema = {"name": "it", "schema": random_schema(self._source.randrange(200))}
            messages = [{"role": "user", "content": "Describe it as JSON. " + self._words(20)}]
            asked = {"messages": messages, "response_format": {"type": "json_schema", "json_schema": schema}}
            return "/v1/chat/completions", body | asked | {"max_tokens": 300}, None
        prompts = {
            "shared": lambda: self._source.choice(self._shared) + " " + self._words(10),
            "long": lambda: self._words(self._source.randint(250, 400)),
            "known": lambda: self._source.choice(self._questions),
        }
        prompt = prompts.get(kind, lambda: self._words(self._source.randint(5, 120)))()
        extras: dict[str, dict[str, Any]] = {
            "several": {"n": 3, "temperature": 1.0, "seed": self._source.randrange(1 << 30)},
            "slow": {"max_tokens": 400},
            "leaves": {"max_tokens": 200, "n": self._source.choice((1, 1, 1, 2))},
        }
        return "/v1/completions", body | {"prompt": prompt, "ignore_eos": True} | extras.get(kind, {}), None

    def _turn(self) -> list[dict[str, str]]:
        """A chat with one question more; each goes on for some turns, a few at a time."""
        chat: list[dict[str, str]] = []
        if len(self._chats) > 3:
            chat = self._chats.pop(self._source.randrange(len(self._chats)))
        if len(chat) >= 2 * TURNS:
            chat = []
        return [*chat, {"role": "user", "content": self._words(15)}]
