"""Every route under generated requests, valid and not: no answer of the 5xx kind, and none that is not documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from router.admission.tenants import Keyring, Tenant, digest
from router.http.openapi import document
from tandem.errors import BadRequest, ContextTooLong, Overloaded, Unavailable, WorkerLost
from tandem.text.tokenizer import Tokenizer

load_all_checks()
DOCUMENTED: list[Any] = [
    CHECKS.get_one(name)
    for name in (
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
    )
]
NO_DEFECT: Any = CHECKS.get_one("not_a_server_error")
KEY = "key-of-the-fuzzer"
OPERATIONS = [(path, method) for path, methods in document("", True)["paths"].items() for method in methods]
TROUBLES = (
    Overloaded("full", retry_s=3.0),
    Unavailable("nobody"),
    WorkerLost("gone"),
    ContextTooLong("too long"),
    BadRequest("not so", "response_format"),
)


def test_every_route_is_documented_and_no_other(world: Any) -> None:
    routes = [route for route in world.app.routes if isinstance(route, Route)]
    served = {(route.path.replace(":path", ""), method) for route in routes for method in route.methods or ()}
    assert {(path, method.upper()) for path, method in OPERATIONS} == {(p, m) for p, m in served if m != "HEAD"}


async def test_the_document_says_whether_keys_are_needed(client: httpx.AsyncClient, world: Any) -> None:
    assert (await client.get("/openapi.json")).json() == document("Tandem", keys=False, model="tiny")
    world.callers.replace(Keyring({digest(KEY): Tenant(name="t")}))
    assert "security" in (await client.get("/openapi.json")).json()["paths"]["/v1/models"]["get"]


@pytest.mark.parametrize("path", sorted({path for path, _ in OPERATIONS}))
async def test_other_methods_are_refused(path: str, client: httpx.AsyncClient) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {
        m.upper() for p, m in OPERATIONS if p == path
    }:
        refused = await client.request(method, path.replace("{", "").replace("}", ""))
        assert (refused.status_code, refused.json()["error"]["type"]) == (405, "invalid_request_error")
        assert refused.headers["allow"]


def cases(operation: Any, method: str) -> st.SearchStrategy[schemathesis.Case[Any]]:
    """Requests that the document allows and, where there is anything to get wrong, some that it does not."""
    valid = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if method == "get":
        return valid  # type: ignore[no-any-return]
    return st.one_of(valid, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", ["open", "keyed", "troubled"])
def test_no_answer_is_a_defect_or_undocumented(
    path: str, method: str, mode: str, make_world: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    world = make_world(tokenizer)
    if mode == "keyed":
        limited = Tenant(name="t", requests_per_minute=4, tokens_per_minute=100)
        world.callers.replace(Keyring({digest(KEY): limited}))
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.app)
    model, number = world.dispatcher.model, 0

    @settings(
        max_examples=40 if mode == "open" and method == "post" else 8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(schema[path][method], method))
    def send(case: schemathesis.Case[Any]) -> None:
        nonlocal number
        number += 1
        if mode == "troubled":
            world.dispatcher.refuse = (*TROUBLES, None)[number % 6]
            world.dispatcher.model = None if number % 6 == 0 else model
            world.dispatcher.fail_after = number % 2
        headers = {"authorization": f"Bearer {KEY}"} if mode == "keyed" and number % 4 else {}
        response = case.call(headers=headers)
        case.validate_response(response, checks=DOCUMENTED if mode == "troubled" else [NO_DEFECT, *DOCUMENTED])

    send()
