"""Keys, tenants and their limits, alone, over HTTP, and shared by two routers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission.quota import Bucket, Quotas
from router.admission.tenants import NOBODY, Keyring, Tenant, digest, read_keys
from router.file_watch import FileWatch
from tandem.cluster import Status, TenantUse
from tandem.errors import BadRequest, ConfigError, Overloaded, RateLimited, TandemError, Unauthorized, Unavailable

A, B = "key-of-tenant-a", "key-of-tenant-b"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# Keys ---------------------------------------------------------------------------------------------------------------


def test_keys_are_found_and_never_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    hashed = "sha256:" + hashlib.sha256(B.encode()).hexdigest()
    path.write_text(
        json.dumps({"tenants": [{"name": "a", "keys": [A], "priority": 3}, {"name": "b", "keys": [hashed]}]})
    )
    keyring = read_keys(path)
    assert keyring.tenant(f"Bearer {A}").priority == 3
    assert keyring.tenant(f"bearer {B}").name == keyring.tenant(None, B).name == "b"
    assert A not in repr(vars(keyring))
    for wrong in (None, "", "Bearer ", f"Bearer {A}x", f"Basic {A}", "Bearer " + digest(A)):
        with pytest.raises(Unauthorized):
            keyring.tenant(wrong)
    assert Keyring({}).tenant(None) is NOBODY


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tenants: [", "cannot be read: ParserError"),
        ("{}", "tenants: Field required"),
        ("tenants: [{name: a, keys: [secret-secret], rpm: 3}]", "tenants.0.rpm: Extra inputs"),
        ("tenants: [{name: a, keys: [short]}]", "tenants.0.keys.0: String should have at least 8"),
        ("tenants: [{name: a, keys: [secret-secret]}, {name: a, keys: [secret-other]}]", "a is there twice"),
        ("tenants: [{name: a, keys: [secret-secret]}, {name: b, keys: [secret-secret]}]", "a key of b is there twice"),
        ("tenants: [{name: a, keys: ['sha256:secret-secret']}]", "of a is not 64 hexadecimal digits"),
        ("tenants: [{name: a, keys: [secret-secret], requests_per_minute: -1}]", "requests_per_minute: Input should"),
    ],
)
def test_a_wrong_file_is_told_by_field_and_without_keys(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("key", ["secret-schlüssel", "secret-\t-tab-", "secret-\u2028-line", " secret-space"])
def test_a_key_that_no_header_can_carry_is_told_with_its_line(key: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    other = "tenants:\n  - name: a\n    keys:\n      - secret-good one\n      - "
    path.write_text(f"{other}{json.dumps(key)}\n")
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert str(refused.value) == (
        f"--api-keys is {path}; line 5: tenants.0.keys.1: a key must be printable ASCII characters, with no space at "
        "either end: HTTP carries no other"
    )
    path.write_text(other + "secret-fine\n    priority: high\n")
    with pytest.raises(ConfigError, match=r"line 6: tenants\.0\.priority: "):
        read_keys(path)
    path.write_text(other + "secret-fine\n  - name: b\n")
    with pytest.raises(ConfigError, match=r"line 6: tenants\.1\.keys: Field required"):
        read_keys(path)


def test_salts_keep_caches_apart() -> None:
    a, b, shared = Tenant(name="a"), Tenant(name="b"), Tenant(name="c", salt="a")
    assert len({tenant.salt_of(given) for tenant in (a, b) for given in ("", "x", a.salt_of(""))}) == 6
    assert shared.salt_of("x") == a.salt_of("x")
    assert (NOBODY.salt_of(""), NOBODY.salt_of("x")) == ("", "x")


def test_a_tenant_may_ask_for_less_priority_but_not_for_more() -> None:
    tenant = Tenant(name="a", priority=2)
    assert [tenant.priority_of(asked) for asked in (None, 2, -5)] == [2, 2, -5]
    with pytest.raises(BadRequest, match="priority is 3; this key allows at most 2"):
        tenant.priority_of(3)
    assert NOBODY.priority_of(9) == 9


def test_a_changed_file_is_read_again_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"tenants: [{{name: a, keys: [{A}]}}]")
    read: list[Keyring] = []
    watch = FileWatch(path, lambda changed: read.append(read_keys(changed)))
    watch.read()
    watch.look()
    assert len(read) == 1
    path.write_text("tenants: 5")
    watch.look()
    assert len(read) == 1
    other = tmp_path / "new"
    other.write_text(f"tenants: [{{name: b, keys: [{B}]}}]")
    other.replace(path)
    watch.look()
    assert read[-1].tenant(f"Bearer {B}").name == "b"


# Quotas -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=40))
def test_a_bucket_never_gives_more_than_two_minutes_allowance_in_a_minute(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now = Bucket(per_minute, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        now += pause
        wait = bucket.wait_s(amount, now)
        if wait == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
        else:
            assert bucket.wait_s(amount, now + wait) < 1e-6
        lately = sum(amount for at, amount in taken if now - at < 60)
        assert lately <= 2 * per_minute + 50
        assert bucket.left(now) <= per_minute


def limited(**limits: Any) -> Tenant:
    return Tenant(name="a", **limits)


def test_requests_a_minute_come_back_evenly() -> None:
    clock = Clock()
    quotas, tenant = Quotas("me", clock), limited(requests_per_minute=6)
    for _ in range(6):
        quotas.enter(tenant).end(0)
    with pytest.raises(RateLimited, match="6 requests a minute") as refused:
        quotas.enter(tenant)
    assert refused.value.retry_s == pytest.approx(10)
    clock.now += 10
    quotas.enter(tenant).end(0)
    assert dict(quotas.headers(tenant)) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }


def test_tokens_count_prompt_and_answer_and_debts_are_paid() -> None:
    clock = Clock()
    quotas, tenant = Quotas("me", clock), limited(tokens_per_minute=600)
    visit = quotas.enter(tenant)
    visit.prompt(100)
    visit.end(1100)
    visit.end(1100)
    with pytest.raises(RateLimited) as refused:
        visit.prompt(50)
    assert refused.value.retry_s == pytest.approx(65)
    clock.now += 120
    # More than the limit at once is let through when all of the allowance is there: else it would never be.
    visit = quotas.enter(tenant)
    visit.prompt(5000)
    with pytest.raises(RateLimited):
        visit.prompt(1)


def test_what_the_cluster_refused_is_given_back_and_not_counted() -> None:
    quotas, tenant = Quotas("me", Clock()), limited(tokens_per_minute=600)
    for output in (0, 7):
        visit = quotas.enter(tenant)
        visit.prompt(500)
        if not output:
            visit.refused()
        visit.end(output)
        assert dict(quotas.headers(tenant))["x-ratelimit-remaining-tokens"] == ("93" if output else "600")
    (spent,) = [f.samples for f in quotas.collect() if f.name == "tandem_tenant_tokens"]
    assert [sample.value for sample in spent] == [507]


def test_who_owes_tokens_is_refused_before_its_prompt_is_known_and_pays_no_request() -> None:
    clock = Clock()
    quotas, tenant = Quotas("me", clock), limited(requests_per_minute=6, tokens_per_minute=600)
    quotas.enter(tenant).prompt(599)
    quotas.enter(tenant).prompt(1)  # one is left: what the prompt has is not known yet
    with pytest.raises(RateLimited, match="600 tokens a minute, and has used them") as refused:
        quotas.enter(tenant)
    assert refused.value.retry_s == pytest.approx(0.1)
    assert dict(quotas.headers(tenant))["x-ratelimit-remaining-requests"] == "4"
    assert quotas.inside() == {"a": 2}
    (limits,) = [f.samples for f in quotas.collect() if f.name == "tandem_tenant_refused"]
    assert [(sample.labels["limit"], sample.value) for sample in limits] == [("tokens", 1)]
    clock.now += 0.2
    quotas.enter(tenant)
    free = Tenant(name="b", requests_per_minute=6)
    quotas.enter(free).end(5000)
    quotas.enter(free)


def test_concurrency_counts_what_has_not_ended() -> None:
    quotas, tenant = Quotas("me", Clock()), limited(concurrency=2)
    visits = [quotas.enter(tenant) for _ in range(2)]
    with pytest.raises(RateLimited, match="2 requests of this key are at work; at most 2"):
        quotas.enter(tenant)
    visits[0].end(0)
    quotas.enter(tenant)
    assert quotas.inside() == {"a": 2}


def use(router: str, requests: int, tokens: int, running: int) -> TenantUse:
    return TenantUse("a", router, requests, tokens, running)


def test_two_routers_keep_one_quota_one_status_late() -> None:
    quotas = Quotas("me", Clock())
    tenant = limited(requests_per_minute=10, tokens_per_minute=1000, concurrency=5)
    quotas.enter(tenant).end(0)
    quotas.observe(Status("w", tenants=(use("other", 70, 9000, 1), use("me", 50, 50, 3))))
    assert dict(quotas.headers(tenant))["x-ratelimit-remaining-requests"] == "9"
    quotas.observe(Status("w", tenants=(use("other", 74, 9300, 4), use("me", 60, 60, 3), use("third", 2, 100, 1))))
    left = dict(quotas.headers(tenant))
    assert (left["x-ratelimit-remaining-requests"], left["x-ratelimit-remaining-tokens"]) == ("3", "600")
    with pytest.raises(RateLimited, match="at work"):
        quotas.enter(tenant)
    quotas.forget("w")
    quotas.enter(tenant)
    # Forgotten by the worker, the other's counts start anew.
    quotas.observe(Status("w", tenants=(use("other", 1, 1, 0),)))
    quotas.observe(Status("w"))
    quotas.observe(Status("w", tenants=(use("other", 1, 10, 0),)))
    assert dict(quotas.headers(tenant))["x-ratelimit-remaining-requests"] == "1"


def test_other_limits_count_from_now_on() -> None:
    quotas = Quotas("me", Clock())
    visit = quotas.enter(limited(requests_per_minute=1))
    quotas.update([limited(requests_per_minute=5)])
    assert dict(quotas.headers(limited(requests_per_minute=5)))["x-ratelimit-remaining-requests"] == "5"
    quotas.update([])
    assert quotas.inside() == {"a": 1}
    visit.end(3)
    quotas.update([])
    assert not [sample for family in quotas.collect() for sample in family.samples]


# Over HTTP ----------------------------------------------------------------------------------------------------------

BODY = {"prompt": "Hello", "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest_asyncio.fixture
async def keyed(world: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A router with two tenants, of which b may send two requests a minute."""
    tenants = Tenant(name="a", priority=1), Tenant(name="b", requests_per_minute=2, tokens_per_minute=10_000)
    world.callers.replace(Keyring({digest(A): tenants[0], digest(B): tenants[1]}))
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/explain/1"),
    ],
)  # fmt: skip
async def test_without_a_known_key_nothing_is_served(keyed: httpx.AsyncClient, method: str, path: str) -> None:
    for headers in ({}, bearer("another-key")):
        refused = await keyed.request(method, path, headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert (await keyed.get("/health")).status_code == 200
    assert (await keyed.get("/metrics", headers=bearer(A))).status_code == 401  # it names the tenants


async def test_requests_carry_tenant_priority_and_salt(keyed: httpx.AsyncClient, world: Any) -> None:
    for key in (A, B):
        assert (await keyed.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 200
    a, b = world.dispatcher.requests
    assert [(r.tenant, r.priority) for r in (a, b)] == [("a", 1), ("b", 0)]
    assert a.salt and b.salt and a.salt != b.salt
    asked = await keyed.post("/v1/completions", json={**BODY, "priority": 2}, headers=bearer(A))
    assert (asked.status_code, asked.json()["error"]["param"]) == (400, "priority")


async def test_over_the_limit_is_429_with_openais_headers(keyed: httpx.AsyncClient, world: Any) -> None:
    for left in ("1", "0"):
        answer = await keyed.post("/v1/completions", json={**BODY, "stream": left == "0"}, headers=bearer(B))
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 10_000
    refused = await keyed.post("/v1/completions", json=BODY, headers=bearer(B))
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await keyed.post("/v1/completions", json=BODY, headers=bearer(A))).status_code == 200
    assert world.metric("tandem_request_failures_total", kind="rate_limit_exceeded") == 1


async def test_nothing_is_tokenised_for_a_tenant_that_owes_tokens(
    keyed: httpx.AsyncClient, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owing = Tenant(name="b", tokens_per_minute=10)
    world.callers.replace(Keyring({digest(B): owing}))
    world.callers.enter(owing).end(15)
    texts: list[str] = []

    def encode(text: str, add_special_tokens: bool = False) -> list[int]:
        texts.append(text)
        return [5]

    monkeypatch.setattr(world.tokenizer, "encode", encode)
    refused = await keyed.post("/v1/completions", json=BODY, headers=bearer(B))
    assert (refused.status_code, texts) == (429, [])
    assert 1 <= int(refused.headers["retry-after"]) <= 36


async def test_every_end_of_a_request_ends_its_visit(keyed: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.fail_after = 1
    for stream in (False, True):
        await keyed.post("/v1/completions", json={**BODY, "stream": stream}, headers=bearer(A))
    await keyed.post("/v1/completions", content=b"{", headers=bearer(A))
    assert world.callers.inside() == {}


async def test_nobody_reads_the_story_of_another_tenants_request(keyed: httpx.AsyncClient, world: Any) -> None:
    answer = await keyed.post("/v1/completions", json=BODY, headers=bearer(A))
    name = answer.headers["x-request-id"]
    world.stories.begin(world.dispatcher.requests[-1])
    mine = await keyed.get(f"/v1/explain/{name}", headers=bearer(A))
    assert mine.status_code == 200
    theirs = await keyed.get(f"/v1/explain/{name}", headers=bearer(B))
    unknown = await keyed.get(f"/v1/explain/{'0' * len(name)}", headers=bearer(B))
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.text.replace(name, "") == unknown.text.replace("0" * len(name), "")
    world.callers.replace(Keyring({digest(B): Tenant(name="b", operator=True)}))
    assert (await keyed.get(f"/v1/explain/{name}", headers=bearer(B))).status_code == 200


@pytest.mark.parametrize("refusal", [Unavailable("none", retry_s=1), Overloaded("full", retry_s=1), BadRequest("no")])
async def test_a_refused_request_costs_no_tokens(keyed: httpx.AsyncClient, world: Any, refusal: TandemError) -> None:
    world.dispatcher.refuse = refusal
    for _ in range(2):
        refused = await keyed.post("/v1/completions", json=BODY, headers=bearer(B))
        assert refused.status_code in (400, 429, 503)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "10000"


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "Hello"}), ("/detokenize", {"tokens": [5]})])
async def test_texts_and_ids_are_turned_for_those_who_may_ask(
    keyed: httpx.AsyncClient, world: Any, path: str, body: Any
) -> None:
    for asked, status in ((body, 200), ({}, 400), (body, 429)):
        assert (await keyed.post(path, json=asked, headers=bearer(B))).status_code == status
    assert world.callers.inside() == {}
    world.callers.replace(Keyring({digest(B): Tenant(name="b", concurrency=1)}))
    with world.callers.enter(Tenant(name="b", concurrency=1)):
        assert (await keyed.post(path, json=body, headers=bearer(B))).status_code == 429
    assert (await keyed.post(path, json=body, headers=bearer(B))).status_code == 200
