"""Stories of requests: bounded, shown to their tenant only, and true."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from router.control import ControlPlane
from router.explain.recorder import Recorder
from router.explain.story import BASE_BYTES, Copy, Story, explanation, route
from tandem.cluster import CacheEvent, Candidate, EventKind, Plan, Role, new_id
from tandem.config import RouterConfig
from tandem.errors import Overloaded
from tandem.kv import HashRoot, block_hashes
from tandem.testing.polling import eventually
from tandem.testing.router import Deltas
from tandem.testing.workers import FakeWorker, answer
from tandem.types import FinishReason, GenerateRequest, SamplingParams, Usage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(tenant: str = "", prompt_tokens: int = 5, **fields: Any) -> GenerateRequest:
    prompt = tuple(range(1, prompt_tokens + 1))
    return GenerateRequest(new_id(), "m", prompt, SamplingParams(), tenant=tenant, **fields)


def plan(candidates: int = 1) -> Plan:
    costs = {"queue": 1.0, "prefill": 2.0, "move": 3.0, "admission": 4.0, "slowdown": 5.0}
    return Plan(tuple(Candidate(new_id(), new_id(), 64, 130, dict(costs)) for _ in range(candidates)), "cost")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12), st.integers(0, 8)), max_size=30))
def test_the_recorder_keeps_every_bound(steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    recorder = Recorder(5, 5 * BASE_BYTES, 10.0, clock)
    stories: list[Story] = []
    for tenant, candidates, wait in steps:
        clock.now += wait
        stories.append(recorder.begin(request(tenant)))
        if candidates:
            recorder.planned(stories[-1], plan(candidates), {})
        recorder.check_integrity()
        for story in stories:
            found = recorder.find(story.request_id, None)
            assert found in ([], [story])
            assert not found or clock.now - story.started_s <= 10
            assert recorder.find(story.request_id, story.tenant + "x") == []
            assert recorder.find(story.request_id, story.tenant) == found


def test_the_oldest_goes_first_and_one_too_large_does_not_stay() -> None:
    recorder = Recorder(2, 10 * BASE_BYTES, 10.0, Clock())
    first, second, third = (recorder.begin(request()) for _ in range(3))
    assert [bool(recorder.find(story.request_id, None)) for story in (first, second, third)] == [False, True, True]
    recorder.planned(third, plan(1000), {})
    assert len(recorder) == recorder.weight == 0
    recorder.planned(third, plan(1), {})
    recorder.check_integrity()


def test_a_recorder_of_nothing_remembers_nothing() -> None:
    recorder = Recorder(0, 1 << 20, 10.0, Clock())
    story = recorder.begin(request())
    recorder.planned(story, plan(), {})
    assert recorder.find(story.request_id, None) == []


def test_stories_weigh_what_they_are_said_to() -> None:
    """Within a factor of two, and rather less."""
    recorder = Recorder(1000, 1 << 30, 10.0, Clock())
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(200):
            story = recorder.begin(request())
            recorder.planned(story, plan(10), {"a": 5})
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert recorder.weight / 2 <= taken <= recorder.weight * 1.2


def test_requests_that_came_as_one_are_found_together_but_for_those_of_others() -> None:
    recorder = Recorder(9, 1 << 20, 10.0, Clock())
    mine = [recorder.begin(request("a")) for _ in range(3)]
    theirs = recorder.begin(request("b"))
    recorder.link([story.request_id for story in (*mine, theirs)])
    assert recorder.find(mine[0].request_id, "a") == mine
    assert recorder.find(mine[0].request_id, None) == [*mine, theirs]
    assert recorder.find(mine[1].request_id, "a") == [mine[1]]


def test_an_explanation_has_every_cost_and_what_came_of_it() -> None:
    story = Story.of(request(prompt_tokens=200), 1e9, 10.0)
    made = plan(2)
    story.planned(made, {"a": 64, "b": 500}, 10.5)
    story.refused(Overloaded("full"))
    story.planned(made, {}, 10.6)
    story.taken(64, made.prefill, 11.0)
    story.first_token_s, story.ended_s = 11.5, 12.0
    story.usage[0] = Usage(200, 7, 128, 64, 135, made.prefill or "", 12.5)
    story.finish[0] = FinishReason.LENGTH
    said = explanation(story, lambda incarnation: "host:1")
    assert json.loads(json.dumps(said)) == said
    first, second = said["attempts"]
    assert (first["refusal"], second["refusal"]) == ("full", None)
    assert (first["workers_matched"], first["best_match_tokens"]) == (2, 199)
    (candidate, _) = second["candidates"]
    assert (candidate["decode_matched_blocks"], candidate["prefill_matched_blocks"]) == (1, 2)
    assert candidate["costs"] == {"queue": 1.0, "prefill": 2.0, "move": 3.0, "admission": 4.0, "slowdown": 5.0}
    assert candidate["cost"] == 15.0
    assert candidate["decode"] == {"id": made.decode, "address": "host:1"}
    assert said["predicted"] == {
        "cached_tokens": 130, "decode_cached_tokens": 64, "first_token_ms": 10.0, "hand_over_ms": 6.0
    }  # fmt: skip
    happened = said["happened"]
    assert (happened["state"], happened["finish"], happened["completion_tokens"]) == ("finished", ["length"], 7)
    assert (happened["accepted_ms"], happened["first_token_ms"], happened["end_ms"]) == (1000.0, 1500.0, 2000.0)
    assert (happened["cached_tokens_at_start"], happened["cached_tokens"], happened["moved_tokens"]) == (64, 128, 135)
    assert (happened["hand_over_ms"], happened["prefill"]["id"]) == (12.5, made.prefill)
    assert "address" not in explanation(story, None)["happened"]["decode"]


def test_why_a_copy_failed_is_told_without_addresses() -> None:
    copy = Copy(
        "a" * 32, "b" * 32, 64, {}, "failed", "hand-over from ipv6:%5Bfd00::1%5D:4000: refused by 10.1.2.3:50051"
    )
    story = Story.of(GenerateRequest("r", "m", (1, 2), SamplingParams()), 0.0, 0.0)
    story.copies.append(copy)
    (told,) = explanation(story, None)["copies"]
    assert told["error"] == "hand-over from ?: refused by ?"
    copy.error = ""
    assert explanation(story, None)["copies"][0]["error"] is None


def test_a_policy_that_does_not_count_milliseconds_predicts_none() -> None:
    story = Story.of(request(), 0.0, 0.0)
    story.planned(Plan((Candidate("d", None, 3, 0, {"uncached_tokens": 9.0}),), "longest_prefix"), {}, 0.0)
    assert explanation(story, None)["predicted"]["first_token_ms"] is None


def test_a_route_names_no_address_and_no_whole_id() -> None:
    made = plan()
    said = route(made, 64, 200, made.prefill)
    assert made.prefill is not None
    ends = f"decode={made.decode[:8]};prefill={made.prefill[:8]}"
    assert said == f"{ends};cached=64;expected=130;prompt=200;policy=cost"
    assert route(made, 64, 200, None) == (
        f"decode={made.decode[:8]};prefill=local;cached=64;expected=64;prompt=200;policy=cost"
    )


@asynccontextmanager
async def cluster(workers: int = 1, **settings: Any) -> AsyncIterator[tuple[ControlPlane, list[FakeWorker]]]:
    async with AsyncExitStack() as stack:
        decoders = [await stack.enter_async_context(FakeWorker(Role.DECODE)) for _ in range(workers)]
        addresses = tuple(worker.info.address for worker in decoders)
        config = RouterConfig(control_port=0, workers=addresses, **settings)
        control = await stack.enter_async_context(ControlPlane(config))
        await eventually(lambda: len(control.fleet.snapshot().decode) == workers)
        yield control, decoders


async def test_the_dispatcher_tells_what_happened_and_climbs_the_ladder() -> None:
    async with cluster() as (control, (worker,)):
        asked = request(prompt_tokens=200)
        for cached in (0, 128):
            accepted = await control.dispatcher.submit(asked)
            usage = Usage(200, 2, cached, cached)
            worker.send(answer(worker.submissions[-1], [1, 2], finish=FinishReason.LENGTH, usage=usage))
            assert [delta.tokens async for delta in Deltas(accepted.follow)] == [(1, 2)]
            (story,) = control.recorder.find(asked.request_id, "")
            happened = explanation(story, control.dispatcher.address_of)["happened"]
            assert (happened["state"], happened["cached_tokens"]) == ("finished", cached)
            assert happened["decode"] == {"id": worker.info.incarnation, "address": worker.info.address}
            assert 0 <= happened["accepted_ms"] <= happened["first_token_ms"] <= happened["end_ms"]
            asked = request(prompt_tokens=200)
            root = HashRoot("tandem", worker.info.model.fingerprint, worker.info.kv_dtype).digest()
            worker.publish(CacheEvent(EventKind.STORED, tuple(block_hashes(root, asked.prompt))))
            await eventually(lambda: control.index.match(block_hashes(root, asked.prompt)))  # noqa: B023
        total = control.ladder.total
        assert (total.prompt, total.ideal, total.capacity, total.achieved) == (384, 192, 192, 128)
        assert total.perfect_routing == 192
        control.ladder.check_integrity()


async def test_a_refusal_is_told_with_the_worker_that_refused() -> None:
    async with cluster(2) as (control, workers):
        refusing = workers[0]
        refusing.refusal = Overloaded("no room here")
        workers[1].report(running=50, free_pages=100, total_pages=100)
        await eventually(lambda: any(view.status.running for view in control.fleet.snapshot().decode))
        asked = request()
        accepted = await control.dispatcher.submit(asked)
        (story,) = control.recorder.find(asked.request_id, None)
        await accepted.cancel()
        first, second = story.attempts
        assert (first.plan.decode, first.refusal) == (refusing.info.incarnation, "no room here")
        assert (second.plan.decode, second.refusal) == (workers[1].info.incarnation, "")
        workers[1].refusal = Overloaded("nor here")
        asked = request()
        try:
            await control.dispatcher.submit(asked)
        except Overloaded:
            (story,) = control.recorder.find(asked.request_id, None)
            assert explanation(story, None)["happened"]["state"] == "refused"
        else:
            raise AssertionError("both refuse")


async def test_answers_carry_their_route_and_can_be_explained(client: httpx.AsyncClient, world: Any) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 4}
    for stream in (False, True):
        response = await client.post("/v1/completions", json={**body, "stream": stream})
        assert response.status_code == 200
        first, second = response.headers["x-tandem-route"].split(", ")
        assert first.startswith("decode=") and "policy=fake" in second and "prompt=3" in second
    name = response.headers["x-request-id"]
    world.stories.begin(world.dispatcher.requests[-2])
    explained = (await client.get(f"/v1/explain/{name}")).json()
    assert (explained["object"], explained["id"]) == ("tandem.explanation", name)
    assert [each["id"] for each in explained["requests"]] == [name]
    unknown = await client.get(f"/v1/explain/{'0' * 32}")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert "another router may have served it" in unknown.json()["error"]["message"]
