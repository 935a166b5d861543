"""What a router's metrics pages say of its fleet and its bounds, and where they say it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.control import ControlPlane
from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from router.monitoring.monitor import monitored
from router.requests.texts import ModelTexts
from tandem.cluster import CacheEvent, EventKind, MoveStat, Role, Status
from tandem.config import RouterConfig
from tandem.testing.polling import eventually
from tandem.testing.workers import FakeWorker


@dataclass
class Watched:
    control: ControlPlane
    metrics: RouterMetrics
    http: httpx.AsyncClient

    async def value(self, series: str, page: str = "/metrics") -> float:
        """A sample by its name and labels, as written on the page."""
        lines = (await self.http.get(page)).text.splitlines()
        (found,) = [line for line in lines if line.startswith(series + " ")]
        return float(found.rsplit(" ", 1)[1])


@asynccontextmanager
async def watched(**settings: Any) -> AsyncIterator[Watched]:
    config, metrics = RouterConfig(control_port=0, **settings), RouterMetrics()
    async with ControlPlane(config) as control, monitored(config, control, metrics):
        api = Api(config, control.dispatcher, ModelTexts(None, False, None), metrics, control.recorder, control.callers)
        transport = httpx.ASGITransport(create_app(config, api))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield Watched(control, metrics, http)


def addresses(*workers: FakeWorker) -> tuple[str, ...]:
    return tuple(worker.info.address for worker in workers)


async def test_workers_are_counted_by_role_and_state_and_noughts_are_there() -> None:
    async with FakeWorker(Role.DECODE) as decode, watched(workers=addresses(decode)) as made:
        await eventually(lambda: made.control.fleet.snapshot().decode)
        workers = 'tandem_fleet_workers{role="%s",state="%s"}'
        assert await made.value(workers % ("decode", "ready")) == 1
        assert await made.value(workers % ("prefill", "ready")) == 0
        me = decode.info.incarnation
        decode.publish(status=Status(me, queued_tokens=77, free_pages=200, total_pages=256, draining=True))
        await eventually(lambda: made.control.fleet.snapshot().decode[0].draining)
        assert await made.value(workers % ("decode", "ready")) == 0
        assert await made.value(workers % ("decode", "draining")) == 1
        who = f'{{role="decode",worker="{decode.info.address}"}}'
        assert await made.value("tandem_fleet_queued_tokens" + who) == 77
        await decode.stop()
        await eventually(lambda: not made.control.fleet.known())
        assert await made.value('tandem_fleet_workers_ended_total{cause="lost",role="decode"}') == 1
        assert await made.value('tandem_fleet_workers_ended_total{cause="goodbye",role="decode"}') == 0


async def test_failed_hand_overs_and_avoided_pairs_are_shown() -> None:
    async with FakeWorker(Role.DECODE) as decode, watched(workers=addresses(decode)) as made:
        await eventually(lambda: made.control.fleet.snapshot().decode)
        me = decode.info.incarnation
        assert await made.value("tandem_kv_pairs_avoided") == 0
        decode.publish(status=Status(me))
        decode.publish(status=Status(me, moves=(MoveStat("p", me, "tcp", bytes=9, tickets=2, failures=3),)))
        await eventually(made.control.dispatcher.pairs.broken)
        assert await made.value("tandem_kv_pairs_avoided") == 1
        pair = f'{{receiver="{me}",sender="p",transport="tcp"}}'
        assert await made.value("tandem_kv_handover_failures_total" + pair) == 3
        assert await made.value("tandem_kv_handovers_total" + pair) == 2


async def test_the_index_and_the_queue_are_shown_beside_their_limits() -> None:
    async with (
        FakeWorker(Role.DECODE) as decode,
        watched(workers=addresses(decode), max_inflight=1, max_queued=0, index_max_blocks=8) as made,
    ):
        await eventually(lambda: made.control.fleet.snapshot().decode)
        decode.publish(CacheEvent(EventKind.STORED, (b"1" * 16, b"2" * 16)))
        await eventually(lambda: len(made.control.index))
        values = {name: await made.value(f"tandem_index_{name}") for name in ("blocks", "blocks_limit")}
        assert values == {"blocks": 2, "blocks_limit": 8}
        gate = made.control.dispatcher.admission
        await gate.enter("one")
        with pytest.raises(Exception, match="in flight"):
            await gate.enter("two")
        assert await made.value('tandem_admission_refused_total{cause="full"}') == 1
        assert await made.value("tandem_admission_running") == 1
        assert await made.value("tandem_admission_running_limit") == 1
        gate.leave("one")


async def test_prometheus_finds_the_workers_pages(tmp_path: Path) -> None:
    async with (
        FakeWorker(Role.DECODE, metrics_port=4567) as decode,
        FakeWorker(Role.PREFILL) as prefill,  # has no page
        watched(workers=addresses(decode, prefill), served_model_name="chat") as made,
    ):
        await eventually(lambda: len(made.control.fleet.known()) == 2)
        answer = await made.http.get("/metrics/targets")
        assert answer.headers["content-type"] == "application/json"
        labels = {"component": "decode", "model": "chat", "instance": decode.info.address}
        assert json.loads(answer.text) == [{"targets": ["127.0.0.1:4567"], "labels": labels}]


async def test_targets_and_aliases_are_guarded_as_metrics_are() -> None:
    async with watched(metrics_token="a-token-for-metrics", metrics_alias="vllm") as made:
        for path in ("/metrics", "/metrics/targets", "/metrics/fleet", "/metrics/vllm"):
            assert (await made.http.get(path)).status_code == 401
            shown = {"authorization": "Bearer a-token-for-metrics"}
            assert (await made.http.get(path, headers=shown)).status_code == 200


async def test_vllms_names_mean_what_they_mean_there() -> None:
    async with (
        FakeWorker(Role.DECODE, total_pages=100) as one,
        FakeWorker(Role.DECODE, total_pages=100) as two,
        watched(workers=addresses(one, two), metrics_alias="vllm", served_model_name="chat") as made,
    ):
        await eventually(lambda: len(made.control.fleet.snapshot().decode) == 2)
        for worker, free in ((one, 100), (two, 50)):
            me = worker.info.incarnation
            worker.publish(status=Status(me, running=3, waiting=2, free_pages=free, total_pages=100))
        await eventually(lambda: sum(view.status.running for view in made.control.fleet.snapshot().decode) == 6)
        timer = made.metrics.start("chat")
        timer.accepted()
        timer.tokens(0, 1)
        timer.tokens(0, 4)
        timer.prompt(100, 64)
        timer.end("ok")
        of = '{engine="0",model_name="chat"}'
        expected = {
            "num_requests_running": 6,
            "num_requests_waiting": 4,
            "kv_cache_usage_perc": 0.25,
            "prompt_tokens_total": 100,
            "prefix_cache_queries_total": 100,
            "prefix_cache_hits_total": 64,
            "generation_tokens_total": 5,
            "time_to_first_token_seconds_count": 1,
            "inter_token_latency_seconds_count": 1,
            "e2e_request_latency_seconds_count": 1,
        }
        found = {name: await made.value(f"vllm:{name}{of}", "/metrics/vllm") for name in expected}
        assert found == expected
        page = (await made.http.get("/metrics/vllm")).text
        families = {family.name: family for family in text_string_to_metric_families(page)}
        (config,) = families["vllm:cache_config_info"].samples
        assert (config.labels["block_size"], config.labels["num_gpu_blocks"]) == ("16", "200")
        bounds = [s for s in families["vllm:time_to_first_token_seconds"].samples if s.name.endswith("_bucket")]
        assert bounds[-1].labels["le"] == "+Inf" and bounds[-1].value == 1


async def test_without_the_setting_there_is_no_alias() -> None:
    async with watched() as made:
        answer = await made.http.get("/metrics/vllm")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "there is no page 'vllm' of metrics; there are fleet, targets"


async def test_the_event_loops_lag_is_measured() -> None:
    async with watched() as made:
        async with asyncio.timeout(10):
            while not await made.value("tandem_event_loop_lag_seconds_count"):
                await asyncio.sleep(0.05)
