"""Two router replicas behind a plain TCP balancer: one's death harms its own streams only, and hits do not suffer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest

from tandem.ports import free_ports
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

KEYS = """
tenants:
  - {name: load, keys: [key-of-the-load]}
  - {name: small, keys: [key-of-the-small], requests_per_minute: 3}
"""
LOAD = {"authorization": "Bearer key-of-the-load"}
SMALL = {"authorization": "Bearer key-of-the-small"}
SESSIONS, TURNS = 12, 4
FIRST, MORE = 150, 90
"""Tokens of a session's first prompt, and what each turn adds."""
STREAM_TOKENS = 1600
WITHIN = 0.02
PAGE = 16
"""Workers reuse whole pages, whatever the router remembers."""


@dataclass
class Balancer:
    """Accepts TCP connections and gives them to backends in turn, passing over those that refuse. Knows no HTTP."""

    ports: Sequence[int]
    chosen: list[int] = field(default_factory=list)
    """The backend of every connection, in the order in which they were made."""
    turn: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in self.ports:
            port = self.ports[self.turn % len(self.ports)]
            self.turn += 1
            try:
                backend_reader, backend = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            self.chosen.append(port)
            await asyncio.gather(self._copy(reader, backend), self._copy(backend_reader, writer))
            return
        writer.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()
        with contextlib.suppress(OSError):
            await target.wait_closed()


@contextlib.asynccontextmanager
async def balancer(*ports: int) -> AsyncIterator[tuple[Balancer, str]]:
    made = Balancer(ports)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    async with server:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


TOKEN = "token-of-the-replicas"


@dataclass
class Replicas:
    first: Cluster
    second: Cluster
    """The same workers as another router sees them."""


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    model = make_checkpoint(folder / "llama", CheckpointSpec(seed=1, max_positions=2048))
    http, control = free_ports(2)
    lease = ["--lease-s", "3"]
    keys = folder / "keys.yaml"
    keys.write_text(KEYS)
    # What replicas know is compared, not what a policy makes of step times that a busy machine has measured.
    asked = [*lease, "--api-keys", str(keys), "--policy", "longest_prefix"]
    arguments = ["router", "--model", str(model), "--port", str(http), "--control-port", str(control), *asked]
    other = Process("router-1", arguments, http, folder / "router-1.log", {"TANDEM_TOKEN": TOKEN})
    both = ["--router", f"127.0.0.1:{control}", "--kv-mib", "32", *lease]
    with cluster(model, folder, prefill=0, decode=2, worker_args=both, router_args=asked, token=TOKEN) as first:
        other.start()
        try:
            second = Cluster(other, first.workers, token=TOKEN)
            second.wait_ready()
            yield Replicas(first, second)
        finally:
            other.kill()


def prompt(session: int, turn: int) -> list[int]:
    return [(session * 37 + position * 13 + position // 97) % 250 for position in range(FIRST + turn * MORE)]


async def ask(url: str, salt: str, session: int, turn: int) -> tuple[int, int]:
    """One turn on a connection of its own: its prompt tokens, and how many of them were cached."""
    body = {"prompt": prompt(session, turn), "max_tokens": 4, "temperature": 0, "cache_salt": salt}
    async with httpx.AsyncClient(timeout=60, headers=LOAD) as client:
        answer = await client.post(url + "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def hit_share(url: str, salt: str, sessions: Sequence[int], turns: Sequence[int]) -> float:
    """The cached share of prompts; sessions take turns, so that workers can tell what they stored in between."""
    tokens = cached = 0
    for turn in turns:
        for session in sessions:
            asked, found = await ask(url, salt, session, turn)
            tokens, cached = tokens + asked, cached + found
    return cached / tokens


async def stream(url: str, started: asyncio.Event, session: int) -> int:
    """Streams an answer to its end; how many tokens came. Raises when it does not end well."""
    body = {"prompt": prompt(session, 0), "max_tokens": STREAM_TOKENS, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    async with (
        httpx.AsyncClient(timeout=60, headers=LOAD) as client,
        client.stream("POST", url + "/v1/completions", json=body) as got,
    ):
        assert got.status_code == 200
        lines = [line async for line in _lines(got, started)]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return int(json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"])


async def _lines(answer: httpx.Response, started: asyncio.Event) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line:
            started.set()
            yield line


async def test_two_replicas_hit_as_often_as_one(replicas: Replicas) -> None:
    every, turns = range(SESSIONS), range(TURNS)
    alone = await hit_share(replicas.first.url, "alone", every, turns)
    async with balancer(replicas.first.router.port, replicas.second.router.port) as (made, url):
        together = await hit_share(url, "together", every, turns)
        assert abs(made.chosen.count(made.ports[0]) - made.chosen.count(made.ports[1])) <= 1
    assert alone > 0.5
    assert together >= alone - WITHIN


async def test_two_replicas_keep_one_quota(replicas: Replicas) -> None:
    body = {"prompt": "Hello", "max_tokens": 2}
    async with httpx.AsyncClient(timeout=60, headers=SMALL) as client:

        async def status(replica: Cluster) -> int:
            return (await client.post(replica.url + "/v1/completions", json=body)).status_code

        assert [await status(replicas.first) for _ in range(2)] == [200, 200]
        async with asyncio.timeout(10):
            while replicas.second.metric("tandem_tenant_requests_left") > 2:
                await asyncio.sleep(0.05)
        assert [await status(replicas.second) for _ in range(2)] == [200, 429]


async def test_a_killed_replica_harms_its_own_streams_only_and_hits_again_once_it_is_back(replicas: Replicas) -> None:
    first, second = replicas.first, replicas.second
    ports = first.router.port, second.router.port
    async with balancer(*ports) as (made, url):
        await hit_share(url, "back", range(SESSIONS), range(2))
        made.chosen.clear()
        streams = []
        for number in range(6):
            started = asyncio.Event()
            streams.append(asyncio.ensure_future(stream(url, started, number)))
            async with asyncio.timeout(30):
                await started.wait()
        await asyncio.to_thread(second.router.kill)
        ends = await asyncio.gather(*streams, return_exceptions=True)
        for port, end in zip(made.chosen, ends, strict=True):
            assert end == STREAM_TOKENS if port == ports[0] else isinstance(end, Exception), (port, end)
        # New connections go to the one that is left.
        assert (await ask(url, "back", 0, 1))[1] > 0
    second.router.start()
    await asyncio.to_thread(second.wait_ready)
    half = SESSIONS // 2
    lasting = await hit_share(first.url, "back", range(half), [2])
    restarted = await hit_share(second.url, "back", range(half, SESSIONS), [2])
    assert lasting > 0.5
    assert restarted >= lasting - WITHIN
    await asyncio.to_thread(second.router.kill)
    await asyncio.to_thread(partial(first.check_leaks, within_s=20.0))


async def test_a_real_route_can_be_explained(replicas: Replicas) -> None:
    await ask(replicas.first.url, "why", 1, 0)
    async with httpx.AsyncClient(base_url=replicas.first.url, timeout=60, headers=LOAD) as client:
        body = {"prompt": prompt(1, 1), "max_tokens": 4, "temperature": 0, "cache_salt": "why"}
        answer = await client.post("/v1/completions", json=body)
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert f"cached={cached};" in answer.headers["x-tandem-route"]
        (told,) = (await client.get(f"/v1/explain/{answer.headers['x-request-id']}")).json()["requests"]
        unknown = await client.get("/v1/explain/unknown")
    happened = told["happened"]
    assert (happened["state"], happened["cached_tokens"], happened["completion_tokens"]) == ("finished", cached, 4)
    assert 0 < happened["accepted_ms"] <= happened["first_token_ms"] <= happened["end_ms"]
    (attempt,) = told["attempts"]
    assert {each["decode"]["id"] for each in attempt["candidates"]} >= {happened["decode"]["id"]}
    best = attempt["candidates"][0]
    assert best["decode"]["id"] == happened["decode"]["id"]
    assert abs(sum(best["costs"].values()) - best["cost"]) < 0.01
    assert best["decode_matched_blocks"] == FIRST // 64
    assert cached <= told["predicted"]["cached_tokens"] < cached + PAGE
    assert unknown.status_code == 404
    rungs = dict.fromkeys(("prompt", "ideal", "capacity", "perfect_routing", "achieved"), 0.0)
    for line in replicas.first.get("/metrics").splitlines():
        if line.startswith("tandem_hit_ladder_tokens_total{"):
            rungs[line.split('"')[1]] = float(line.rsplit(" ", 1)[1])
    # The other router's prompts are not among what this one calls ideal.
    assert rungs["prompt"] > rungs["ideal"] >= rungs["capacity"] > 0
    assert rungs["prompt"] > rungs["perfect_routing"] > 0 < rungs["achieved"]
