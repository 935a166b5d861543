"""CVE-2025-30202, CVE-2026-27482, ShadowRay: ports open to all, and routes or methods that a check does not cover."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from fastapi.routing import APIRoute

import tandem.wire.v1
from router.control import ControlPlane
from tandem.cli.options import build, command
from tandem.cli.up import plan
from tandem.cluster import Role
from tandem.config import DecodeConfig, PrefillConfig, RouterConfig, UpConfig
from tandem.errors import ConfigError
from tandem.testing.workers import FakeWorker, fake_info
from tandem.trust import Certificates, Trust
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc
from tandem.worker.metrics import WorkerMetrics
from tests.security.rig import KEY, METRICS, OPERATOR, TOKEN, Authority, Front, caller

OPEN_TO_ALL = {"/health", "/ready", "/openapi.json"}
"""They tell nothing of tenants, and probes have no keys."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
WIDE = ("0.0.0.0", "::", "10.0.0.7", "192.168.1.2", "node-7", "")
SECRET = "secret-of-sixteen"


# Start-up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", WIDE)
def test_listening_wider_than_loopback_needs_a_secret_and_says_which(host: str, keys: Path) -> None:
    for schema, given, fix in (
        (RouterConfig, {"host": host}, "--api-keys"),
        (RouterConfig, {"control_host": host}, "TANDEM_TOKEN"),
        (UpConfig, {"model": "m", "host": host}, "--api-keys"),
        (DecodeConfig, {"model": "m", "host": host}, "TANDEM_TOKEN"),
        (PrefillConfig, {"model": "m", "host": host}, "TANDEM_TOKEN"),
        (DecodeConfig, {"model": "m", "host": host, "token": SECRET}, "TANDEM_METRICS_TOKEN"),
        (DecodeConfig, {"model": "m", "host": host, "metrics_token": SECRET}, "--tls-cert"),
    ):
        with pytest.raises(ConfigError, match=f"is {host}; .*{fix}.* or listen on 127.0.0.1"):
            build(schema, given)
    assert build(RouterConfig, {"host": host, "api_keys": keys}).host == host
    assert build(RouterConfig, {"control_host": host, "token": SECRET}).control_host == host
    assert build(DecodeConfig, {"model": "m", "host": host, "token": SECRET, "metrics_token": SECRET}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert build(RouterConfig, {"host": host, "control_host": host}).token is None
    assert build(DecodeConfig, {"model": "m", "host": host}).host == host


@pytest.mark.parametrize("secret", ["", " ", "short", "fifteen-letters", "sixteen letters ", "ü" * 16])
@pytest.mark.parametrize("name", ["token", "metrics_token"])
def test_an_empty_or_weak_secret_is_refused_and_not_shown(
    name: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TANDEM_{name.upper()}", secret)
    with pytest.raises(ConfigError, match=f"TANDEM_{name.upper()}: at least 16 characters") as refused:
        build(RouterConfig, {})
    assert len(secret) < 5 or secret not in str(refused.value)


def test_secrets_have_no_flags_and_no_representation() -> None:
    for schema in (RouterConfig, DecodeConfig, PrefillConfig, UpConfig):
        flags = command(schema, lambda config: None).__signature__.parameters  # type: ignore[attr-defined]
        assert not [name for name in flags if name.endswith("token")]
    config = build(RouterConfig, {"token": SECRET, "metrics_token": SECRET})
    trust = Trust.of(config)
    assert trust.token == SECRET
    assert SECRET not in repr(config) + repr(trust) + str(config.model_dump())


def test_certificates_come_whole(tmp_path: Path) -> None:
    pem = tmp_path / "pem"
    pem.write_text("x")
    for count in (1, 2):
        for names in itertools.combinations(("tls_cert", "tls_key", "tls_ca"), count):
            with pytest.raises(ConfigError, match="are needed together"):
                build(RouterConfig, dict.fromkeys(names, pem))


def test_up_makes_a_secret_of_its_own_and_hands_it_on_unseen() -> None:
    router, workers = plan(build(UpConfig, {"model": "m", "port": 1, "token": SECRET}), "m")
    for child in (router, *workers):
        assert child.environment["TANDEM_TOKEN"] == SECRET
        assert not [argument for argument in child.arguments if SECRET in argument]


# gRPC ---------------------------------------------------------------------------------------------------------------


def calls() -> list[tuple[str, str]]:
    """(service, method) of everything in the wire's definitions."""
    modules = [module.name for module in pkgutil.iter_modules(tandem.wire.v1.__path__) if module.name.endswith("_pb2")]
    found = [importlib.import_module(f"tandem.wire.v1.{name}").DESCRIPTOR.services_by_name for name in modules]
    return [
        (service.full_name, method.name) for each in found for service in each.values() for method in service.methods
    ]


class Everything(grpc.GenericRpcHandler):
    """Answers every method."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def service(self, handler_call_details: Any) -> Any:
        async def answer(messages: Any, context: Any) -> AsyncIterator[bytes]:
            self.reached.append(handler_call_details.method)
            yield b""

        return grpc.stream_stream_rpc_method_handler(answer)


@asynccontextmanager
async def served(trust: Trust) -> AsyncIterator[tuple[str, Everything]]:
    server, everything = trust.server(), Everything()
    server.add_generic_rpc_handlers((everything,))
    port = trust.listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", everything
    finally:
        await server.stop(None)


async def status(trust: Trust, address: str, path: str, **named: Any) -> grpc.StatusCode:
    async with trust.channel(address) as opened:
        channel: Any = opened  # bytes go as they are
        call = channel.unary_stream(path)(b"", timeout=5.0, **named)
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert [each async for each in call] == [b""]
        return grpc.StatusCode(await call.code())


async def test_every_call_needs_the_token() -> None:
    known = calls()
    assert len(known) >= 8
    async with served(Trust(TOKEN)) as (address, everything):
        for service, method in known:
            path = f"/{service}/{method}"
            for wrong in (Trust(), Trust(TOKEN + "x"), Trust(TOKEN[:-1]), Trust("x")):
                assert await status(wrong, address, path) is grpc.StatusCode.UNAUTHENTICATED
            assert everything.reached == []
            assert await status(Trust(TOKEN), address, path) is grpc.StatusCode.OK
            assert everything.reached == [path]
            everything.reached.clear()
        blank = await status(Trust(), address, "/any/thing", metadata=(("tandem-token", ""),))
        assert blank is grpc.StatusCode.UNAUTHENTICATED


async def several() -> AsyncIterator[bytes]:
    yield b""


async def test_channels_of_each_kind_show_the_token() -> None:
    async with served(Trust(TOKEN)) as (address, _), Trust(TOKEN).channel(address) as opened:
        channel: Any = opened
        assert await channel.unary_unary("/a/a")(b"", timeout=5.0) == b""
        assert await channel.stream_unary("/a/b")(several(), timeout=5.0) == b""
        assert [each async for each in channel.unary_stream("/a/c")(b"", timeout=5.0)] == [b""]
        assert await channel.stream_stream("/a/d")(several(), timeout=5.0).read() == b""


async def test_a_router_takes_no_registration_without_the_token_and_follows_workers_with_it() -> None:
    message = worker_pb2.RegisterRequest(worker=codec.worker_info_to_wire(fake_info(Role.DECODE)))
    async with FakeWorker(Role.DECODE) as worker:
        config = build(RouterConfig, {"control_port": 0, "token": TOKEN, "workers": (worker.info.address,)})
        async with ControlPlane(config) as control:
            async with Trust().channel(f"127.0.0.1:{control.port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await worker_pb2_grpc.RegistryStub(channel).Register(message, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            async with Trust(TOKEN).channel(f"127.0.0.1:{control.port}") as channel:
                await worker_pb2_grpc.RegistryStub(channel).Register(message, timeout=5.0)
            await worker.until(lambda: worker.watches == 1)
            assert worker.tokens == {TOKEN}


@pytest.mark.parametrize("name", ["", "tandem"])
async def test_mutual_tls_lets_in_who_the_authority_knows(name: str, authority: Authority) -> None:
    """name: in the certificate, in place of the address."""
    mine, other = authority.issue(name), Authority().issue(name)
    stranger = Certificates(other.chain, other.key, mine.authority, name)
    async with served(Trust(certificates=mine)) as (address, everything):
        for wrong in (Trust(), Trust(certificates=other), Trust(certificates=stranger)):
            assert await status(wrong, address, "/a/b") is grpc.StatusCode.UNAVAILABLE
        elsewhere = Certificates(mine.chain, mine.key, mine.authority, "another-name")
        assert await status(Trust(certificates=elsewhere), address, "/a/b") is grpc.StatusCode.UNAVAILABLE
        assert everything.reached == []
        assert await status(Trust(certificates=authority.issue(name)), address, "/a/b") is grpc.StatusCode.OK


async def test_certificates_and_token_are_both_needed_where_both_are_set(authority: Authority, tmp_path: Path) -> None:
    mine = authority.issue()
    files = {"tls_cert": mine.chain, "tls_key": mine.key, "tls_ca": mine.authority}
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    paths = {file: tmp_path / file for file in files}
    both = Trust.of(build(RouterConfig, {"token": TOKEN, **paths}))
    async with served(both) as (address, _):
        half = Trust.of(build(RouterConfig, dict(paths)))
        assert await status(half, address, "/a/b") is grpc.StatusCode.UNAUTHENTICATED
        assert await status(both, address, "/a/b") is grpc.StatusCode.OK


# HTTP ---------------------------------------------------------------------------------------------------------------


def routes(made: Front) -> dict[str, set[str]]:
    """Every path of the application, with a value for its parameter, and its methods."""
    found = {route.path: set(route.methods or ()) for route in made.app.routes if isinstance(route, APIRoute)}
    assert len(found) == len(made.app.routes)  # nothing is mounted that would not be seen here
    return {path.replace("{name:path}", "tiny").replace("{id}", "abc"): methods for path, methods in found.items()}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong-wrong"}, {"x-api-key": METRICS + "x"},
                                     {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer "}])  # fmt: skip
async def test_every_route_and_method_needs_a_key_unless_listed(locked: Front, headers: dict[str, str]) -> None:
    known = routes(locked)
    assert known.keys() >= OPEN_TO_ALL and len(known) > 10
    async with caller(locked, **headers) as client:
        for path, method in itertools.product((*known, "/v1/nothing", "/"), METHODS):
            answer = await client.request(method, path)
            if method not in known.get(path, ()):
                expected = {404 if path not in known else 405}
            else:
                expected = {200} if path in OPEN_TO_ALL else {401}
            assert answer.status_code in expected, (method, path)
    assert locked.dispatcher.requests == []


@pytest.mark.parametrize(("key", "status"), [(KEY, 401), (OPERATOR, 200), (METRICS, 200), (TOKEN, 200)])
async def test_metrics_name_tenants_and_are_not_for_every_key(key: str, status: int, locked: Front) -> None:
    async with caller(locked, authorization=f"Bearer {key}") as client:
        assert (await client.get("/metrics")).status_code == status


@pytest.mark.parametrize(("key", "status"), [(METRICS, 401), (TOKEN, 200), (KEY, 200)])
async def test_the_token_for_metrics_opens_nothing_else(key: str, status: int, locked: Front) -> None:
    async with caller(locked, authorization=f"Bearer {key}") as client:
        assert (await client.get("/v1/models")).status_code == status


def test_a_workers_metrics_need_their_token() -> None:
    metrics = WorkerMetrics(list)
    port = metrics.serve("127.0.0.1", 0, METRICS)
    try:
        url = f"http://127.0.0.1:{port}/metrics"
        for headers in ({}, {"authorization": f"Bearer {TOKEN}"}, {"authorization": METRICS}):
            refused = httpx.get(url, headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert "tandem_" not in refused.text
        assert "tandem_worker_running" in httpx.get(url, headers={"authorization": f"Bearer {METRICS}"}).text
    finally:
        metrics.close()
