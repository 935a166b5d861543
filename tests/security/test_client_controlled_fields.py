"""vllm #47843 and its like: fields and headers that processes use among themselves are not a client's to set."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest

from tandem.cluster import Ticket
from tandem.types import GenerateRequest
from tandem.wire.v1 import decode_pb2, handover_pb2
from tests.security.rig import KEY, Front, caller

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "seed": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2, "seed": 1},
}
PUBLIC = {"prompt", "request_id", "priority", "model"}
"""Names that clients have, too: an id of their own is ignored, and their priority has a limit."""
FOREIGN = {"kv_transfer_params", "remote_host", "remote_port", "bootstrap_host", "bootstrap_room", "data_parallel_rank",
           "disagg_request_id", "prompt_embeds", "trust_remote_code", "guided_decoding_backend"}  # fmt: skip
INTERNAL = (
    {each.name for each in dataclasses.fields(GenerateRequest)}
    | {each.name for each in dataclasses.fields(Ticket)}
    | set(decode_pb2.SubmitRequest.DESCRIPTOR.fields_by_name)
    | set(handover_pb2.Open.DESCRIPTOR.fields_by_name)
) - PUBLIC


@pytest.mark.parametrize("name", sorted(INTERNAL | FOREIGN))
async def test_internal_fields_are_refused(name: str, anyone: httpx.AsyncClient, opened: Front) -> None:
    for path, body in PATHS.items():
        for value in ("127.0.0.1:1", 1, {"remote_host": "169.254.169.254"}, [1]):
            answer = await anyone.post(path, json={**body, name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), (path, value)
    assert opened.dispatcher.requests == []


HEADERS = {
    "x-request-id": "mine",
    "x-tandem-request-id": "1" * 32,
    "x-tandem-route": "decode=0",
    "x-tandem-tenant": "b",
    "x-tandem-priority": "1000",
    "x-data-parallel-rank": "3",
    "x-prefiller-host-port": "127.0.0.1:1",
    "tandem-token": "token-of-the-cluster",
    "x-forwarded-for": "127.0.0.1",
    "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
}


async def test_no_header_reaches_a_worker(locked: Front) -> None:
    for path, body in PATHS.items():
        async with caller(locked, authorization=f"Bearer {KEY}") as plain:
            assert (await plain.post(path, json=body)).status_code == 200
            answer = await plain.post(path, json=body, headers=HEADERS)
        usual, steered = locked.dispatcher.requests[-2:]
        assert dataclasses.replace(steered, request_id="") == dataclasses.replace(usual, request_id="")
        assert answer.headers["x-tandem-request-id"] == steered.request_id not in ("mine", "1" * 32)
        assert steered.tenant == "a"


async def test_requests_are_named_by_the_router(anyone: httpx.AsyncClient, opened: Front) -> None:
    """A client's own id would let it collide with, and end, another's work (sglang #40125)."""
    for _ in range(2):
        body = {**PATHS["/v1/completions"], "request_id": "same", "rid": "same"}
        await anyone.post("/v1/completions", json=body, headers={"x-request-id": "same"})
    names = [request.request_id for request in opened.dispatcher.requests]
    assert len(set(names)) == 2 and all(len(name) == 32 for name in names)
