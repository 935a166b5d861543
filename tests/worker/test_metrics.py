"""What a worker's page says of drafts, and whom it serves."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from tandem.cluster import Role
from tandem.engine.output import DraftOutcome
from tandem.testing.workers import fake_info
from tandem.worker import metrics as metrics_module
from tandem.worker.metrics import DraftMetrics, WorkerMetrics
from tandem.worker.vllm_page import vllm_page


def test_drafts_are_counted_by_drafter() -> None:
    registry = CollectorRegistry()
    metrics = DraftMetrics(registry)
    for outcome in (DraftOutcome("head", 4, 3), DraftOutcome("head", 5, 0), DraftOutcome("ngram", 8, 8)):
        metrics.add(outcome)

    def value(name: str, drafter: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"drafter": drafter, **labels})

    names = ("steps_total", "draft_tokens_total", "accepted_tokens_total", "accepted_length_sum")
    assert [value(f"tandem_spec_{name}", "head") for name in names] == [2, 9, 3, 5]
    assert [value(f"tandem_spec_{name}", "ngram") for name in names] == [1, 8, 8, 9]
    assert value("tandem_spec_accepted_length_bucket", "head", le="1.0") == 1


@pytest.fixture
def port() -> Iterator[int]:
    metrics = WorkerMetrics(list)
    yield metrics.serve("127.0.0.1", 0)
    metrics.close()


def get(port: int, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=20)


def test_counters_are_there_before_they_count(port: int) -> None:
    page = get(port, "/metrics").text
    for series in (
        'tandem_worker_failures_total{kind="transfer_deadline"} 0.0',
        'tandem_worker_lease_expiries_total{of="peer"} 0.0',
        'tandem_worker_requests_total{outcome="error"} 0.0',
        'tandem_worker_probes_total{outcome="lost"} 0.0',
        "tandem_worker_ready 0.0",
    ):
        assert f"\n{series}\n" in page
    assert get(port, "/metrics/vllm").status_code == 404


def test_a_worker_has_a_page_under_vllms_names() -> None:
    metrics = WorkerMetrics(list)
    info = fake_info(Role.DECODE, total_pages=200)
    metrics.about(info)
    metrics.alias = vllm_page(metrics.registry, info, prefix_cache=True)
    metrics.running.set(3)
    metrics.waiting.set(2)
    metrics.pages.labels("used").set(50)
    metrics.prompt_tokens.inc(100)
    metrics.prefix_hits.labels("decode").inc(32)
    metrics.prefix_hits.labels("prefill").inc(16)
    metrics.requests.labels("length").inc()
    metrics.requests.labels("cancelled").inc(2)
    metrics.drafts.add(DraftOutcome("head", 4, 3))
    try:
        page = get(metrics.serve("127.0.0.1", 0), "/metrics/vllm").text
    finally:
        metrics.close()
    of = 'engine="0",model_name="fake"'
    for line in (
        f"vllm:num_requests_running{{{of}}} 3.0",
        f"vllm:num_requests_waiting{{{of}}} 2.0",
        f"vllm:kv_cache_usage_perc{{{of}}} 0.25",
        f"vllm:prefix_cache_queries_total{{{of}}} 100.0",
        f"vllm:prefix_cache_hits_total{{{of}}} 48.0",
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 2.0',
        f"vllm:spec_decode_num_accepted_tokens_total{{{of}}} 3.0",
        f"vllm:time_to_first_token_seconds_count{{{of}}} 0.0",
    ):
        assert f"\n{line}\n" in page, line
    assert 'block_size="16"' in page and 'num_gpu_blocks="200"' in page


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def healthy(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
    return False


def test_connections_have_a_limit(port: int) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(metrics_module.CONNECTIONS):
            held.enter_context(connect(port))
        assert not healthy(port)
    assert any(healthy(port) for _ in range(1000))


@pytest.mark.parametrize("said", [b"", b"G"], ids=["silent", "slow"])
def test_a_connection_ends_in_time(
    said: bytes, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_module, "CONNECTION_S", 0.1)
    ended = False
    with connect(port) as connection:
        connection.settimeout(0.05)
        for _ in range(300):
            with contextlib.suppress(TimeoutError):
                try:
                    connection.sendall(said)
                    ended = connection.recv(4096) == b""
                except ConnectionError:
                    ended = True
            if ended:
                break
    assert ended and healthy(port)
    assert "Traceback" not in capfd.readouterr().err


def test_a_reader_who_breaks_off_is_one_line(
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    logged = threading.Event()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            logged.set()

    monkeypatch.setattr(metrics_module.log, "handlers", [Lines()])
    caplog.set_level(logging.DEBUG, metrics_module.__name__)
    connection = connect(port)
    connection.sendall(b"GET /metrics")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()  # resets it
    assert logged.wait(20)
    assert len(lines) == 1 and "ConnectionResetError" in lines[0] and "\n" not in lines[0]
    assert "Traceback" not in capfd.readouterr().err
