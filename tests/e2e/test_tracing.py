"""Acceptance: the trace of a disaggregated request arrives whole, and its spans account for its time to first token.

Real processes, the real transport, a real OTLP receiver. The chain is that of all spans without others below them,
from the request's arrival at the router to its first token; time that several of them cover counts once.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tandem import obs
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Host, Process, cluster
from tandem.testing.otlp import Collector, ReceivedSpan, as_text, collector, leaves, union_s

PROMPT_TOKENS = 4000
REQUESTS = 3
BLOWS = 6
TOKEN = "a-secret-of-this-cluster"
SOON = Host(environment=(("OTEL_BSP_SCHEDULE_DELAY", "100"),))
NAMES = ("router", "prefill-0", "decode-0", "decode-1")
WHOLE = {
    ("router", "receive"),
    ("router", "tokenise"),
    ("router", "queue"),
    ("router", "plan"),
    ("router", "attempt"),
    ("router", "submit"),
    ("decode", "decode worker"),
    ("decode", "admission"),
    ("decode", "hand-over"),
    ("decode", "landing"),
    ("decode", "waiting"),
    ("decode", "first token"),
    ("decode", "decode"),
    ("prefill", "prefill worker"),
    ("prefill", "queue"),
    ("prefill", "prefill"),
    ("prefill", "chunk"),
    ("prefill", "transfer"),
}
INTERNAL, SERVER = 1, 2
"""OTLP's kinds of spans."""
ROUTER_CHAIN = ["receive", "tokenise", "queue", "plan", "attempt"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(family="llama", seed=1, layers=4, max_positions=2 * PROMPT_TOKENS)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", spec)


@pytest.fixture(scope="module")
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


def options(received: Collector) -> list[str]:
    return ["--otlp-endpoint", received.url, "--log-format", "json", "--log-level", "debug"]


@dataclass
class Asked:
    trace_id: str
    client_s: float
    """Time to first token as the client saw it."""
    router_s: float
    """As the router's own metric has it."""
    tokens: int


def ttft_sum(running: Cluster) -> float:
    lines = running.get("/metrics").splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(obs.FIRST_TOKEN_SECONDS + "_sum"))


def ask(running: Cluster, seed: int, tokens: int = 8, prompt_tokens: int = PROMPT_TOKENS, lose: bool = False) -> Asked:
    """Streams one completion, in a trace of the client's own. lose: kills its decode worker after the first token."""
    prompt = [(seed * 31 + place * 17 + place // 200) % 250 for place in range(prompt_tokens)]
    body = {"model": "llama", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    trace_id = f"{seed + 1:032x}"
    headers = {"content-type": "application/json", "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    before = ttft_sum(running)
    data = json.dumps({**body, "ignore_eos": True}).encode()
    asked_at = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(running.url + "/v1/completions", data, headers)) as answer:
        lines = [answer.readline()]
        first_at = time.monotonic()
        if lose:
            owner(running, answer.headers["x-tandem-route"]).kill()
        lines += answer.readlines()
    assert lines[-2] == b"data: [DONE]\n", lines[-4:]
    return Asked(trace_id, first_at - asked_at, ttft_sum(running) - before, tokens)


def owner(running: Cluster, route: str) -> Process:
    """The process that a request's `x-tandem-route` names."""
    short = route.removeprefix("decode=").split(";")[0]
    return next(each for each in running.workers.values() if f"decode worker {short}" in each.log.read_text())


def lose_one(running: Cluster) -> Asked:
    """A request that went on elsewhere. One may have ended before the blow falls: then another is asked, and struck."""
    moved = running.metric(obs.REQUESTS_MOVED_TOTAL)
    for blow in range(BLOWS):
        asked = ask(running, 50 + blow, tokens=400, prompt_tokens=600, lose=True)
        if running.metric(obs.REQUESTS_MOVED_TOTAL) > moved:
            return asked
        for worker in running.workers.values():
            if worker.popen is not None and worker.popen.poll() is not None:
                worker.start()
        running.wait_ready()
    raise AssertionError(f"no request was moved by {BLOWS} blows")


def arrived(received: Collector, trace_id: str) -> list[ReceivedSpan]:
    """The trace, once the router and a worker of each kind have told of it."""

    def whole(spans: Sequence[ReceivedSpan]) -> bool:
        return len({span.service for span in spans if span.trace_id == trace_id and span.kind == SERVER}) == 3

    received.wait(whole)
    return received.trace(trace_id)


def root_of(spans: Sequence[ReceivedSpan]) -> ReceivedSpan:
    return next(span for span in spans if span.service == "tandem-router" and span.kind == SERVER)


def check_whole(spans: list[ReceivedSpan], asked: Asked) -> float:
    """One trace with all its spans, none outside its parent's process chain; returns the share that leaves cover."""
    text = as_text(spans)
    assert {(span.service.removeprefix("tandem-"), span.name) for span in spans} - {("router", "completion llama")} == (
        WHOLE
    ), text
    root, ids = root_of(spans), {span.span_id: span for span in spans}
    assert root.parent_id == "00f067aa0ba902b7"
    assert all(span.parent_id in ids for span in spans if span is not root), text
    assert not any(span.failed for span in spans), text
    parents = {span.name: ids[span.parent_id].name for span in spans if span is not root and span.kind != INTERNAL}
    assert parents == {
        "attempt": "completion llama",
        "decode worker": "attempt",
        "hand-over": "decode worker",
        "prefill worker": "hand-over",
    }
    first = next(at for name, at, _ in root.events if name == "first token")
    mine = [span for span in spans if span.parent_id == root.span_id]
    chain = [next(span for span in mine if span.name == name) for name in ROUTER_CHAIN]
    for before, after in pairwise(chain):
        assert after.began == pytest.approx(before.ended, abs=1e-5), text
    ttft = sum(span.seconds for span in chain[:-1]) + first - chain[-1].began
    assert ttft == pytest.approx(asked.router_s, rel=0.05), text
    return union_s(leaves(spans), root.began, first) / asked.router_s


@pytest.fixture(scope="module")
def running(model: Path, received: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and two decode workers, all of which trace, and log all there is as JSON."""
    said = options(received)
    # A policy that always asks a prefill worker.
    router, worker = [*said, "--policy", "round_robin"], ["--kv-mib", "64", *said]
    folder, hosts = tmp_path_factory.mktemp("traced"), dict.fromkeys(NAMES, SOON)
    with cluster(
        model,
        folder,
        decode=2,
        worker_args=worker,
        router_args=router,
        token=TOKEN,
        hosts=hosts,
    ) as made:
        for seed in range(100, 104):
            ask(made, seed)  # first times are slow, and are not what is explained here
        yield made


def test_the_spans_of_a_disaggregated_request_sum_to_its_time_to_first_token(
    running: Cluster, received: Collector
) -> None:
    shares = []
    for seed in range(1, 1 + REQUESTS):
        asked = ask(running, seed)
        spans = arrived(received, asked.trace_id)
        shares.append(check_whole(spans, asked))
        usage = root_of(spans).attributes
        assert usage["gen_ai.usage.input_tokens"] == PROMPT_TOKENS
        assert usage["gen_ai.usage.output_tokens"] == asked.tokens
        moved = next(span for span in spans if span.name == "transfer").attributes["tandem.moved_bytes"]
        assert moved > 0
        sys.stdout.write(f"{as_text(spans)}\nfirst token: client {asked.client_s * 1000:.1f} ms, router ")
        sys.stdout.write(f"{asked.router_s * 1000:.1f} ms, of which spans without others below {shares[-1]:.3f}\n")
    # The rest is messages on their way between processes.
    assert statistics.median(shares) == pytest.approx(1.0, abs=0.05), shares
    running.check_leaks()
    check_logs(running, asked.trace_id)


def test_a_request_whose_decode_worker_dies_shows_both_attempts(running: Cluster, received: Collector) -> None:
    asked = lose_one(running)
    spans = arrived(received, asked.trace_id)
    root = root_of(spans)
    one, two = (span for span in spans if span.name == "attempt")
    assert (one.failed, two.failed, root.failed) == (True, False, False), as_text(spans)
    assert "lost" in one.failure
    assert [name for name, _, _ in root.events if name == "moved"] == ["moved"]
    dead, alive = (span.attributes["tandem.worker.decode"] for span in (one, two))
    there = next(span for span in spans if span.name == "decode worker")
    assert (there.instance, there.parent_id, dead != alive) == (alive, two.span_id, True)
    assert there.attributes["tandem.resumed_tokens"] > 0
    assert root.attributes["gen_ai.usage.output_tokens"] == asked.tokens
    lines = (json.loads(line) for line in running.router.log.read_text().splitlines() if "goes on elsewhere" in line)
    told = [(record.get("trace_id"), record.get("request_id")) for record in lines]
    assert told == [(asked.trace_id, root.attributes["tandem.request_id"])]


def check_logs(running: Cluster, trace_id: str) -> None:
    """Every line is an object, tells no secret, and those about a request carry its ids, in every process."""
    for process in (running.router, *running.workers.values()):
        lines = [line for line in process.log.read_text().splitlines() if not native(line)]
        records = [json.loads(line) for line in lines]
        assert all({"time", "level", "logger", "message"} <= {*record} for record in records)
        assert not any(TOKEN in line for line in lines)
        mine = [record for record in records if record.get("trace_id") == trace_id]
        assert all(len(record["request_id"]) == 32 for record in mine)
        assert mine or process is not running.router, "the plan of a request is logged with its ids"


def native(line: str) -> bool:
    """Whether it was written by gRPC's or UCX's own code, which knows no logging."""
    return line[:1] in "IWE[" or "UCX" in line
