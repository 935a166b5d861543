"""`tandem top`: what a frame says of two reads, and what wrong addresses and keys say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from tandem.cli.app import run
from tandem.cli.fleet_client import FleetClient
from tandem.cli.frame import Reading, frame_between, series_of
from tandem.cli.top import picture
from tandem.config import ProcessConfig

WORKERS: list[dict[str, Any]] = [
    {"incarnation": "p" * 32, "address": "10.0.0.1:1", "role": "prefill", "state": "ready", "metrics": "10.0.0.1:9"},
    {"incarnation": "d" * 32, "address": "10.0.0.2:1", "role": "decode", "state": "draining", "metrics": None},
]
LOAD = {"running": 3, "waiting": 2, "queued_tokens": 700, "free_pages": 25, "total_pages": 100}
ENDS = {"sender": "p" * 32, "receiver": "g" * 32, "transport": "nixl"}
PAIR: dict[str, Any] = {**ENDS, "seconds": 1.0, "tickets": 4, "failures": 1}


def reading(at_s: float, moved: int, finished: int, slow: int, steps: int) -> Reading:
    page = f"""# TYPE tandem_requests_queued gauge
tandem_requests_queued 5
# TYPE tandem_requests_running gauge
tandem_requests_running 7
# TYPE tandem_requests_total counter
tandem_requests_total{{endpoint="chat",outcome="ok"}} {finished}
# TYPE tandem_completion_tokens_total counter
tandem_completion_tokens_total {10 * finished}
# TYPE tandem_prompt_tokens_total counter
tandem_prompt_tokens_total {100 * finished}
# TYPE tandem_cached_prompt_tokens_total counter
tandem_cached_prompt_tokens_total {25 * finished}
# TYPE tandem_time_to_first_token_seconds histogram
tandem_time_to_first_token_seconds_bucket{{le="0.1"}} {finished}
tandem_time_to_first_token_seconds_bucket{{le="1.0"}} {finished + slow}
tandem_time_to_first_token_seconds_bucket{{le="+Inf"}} {finished + slow}
"""
    own = f"""# TYPE tandem_worker_pages gauge
tandem_worker_pages{{state="cached"}} 60
# TYPE tandem_worker_step_tokens_total counter
tandem_worker_step_tokens_total {steps}
"""
    fleet: dict[str, Any] = {"workers": [each | LOAD for each in WORKERS], "pairs": [PAIR | {"bytes": moved}]}
    return Reading("http://r", at_s, fleet, series_of(page), {"p" * 32: series_of(own)})


def test_rates_are_of_the_time_between_two_reads() -> None:
    frame = frame_between(reading(10, 0, 100, 0, 1000), reading(12, 4 << 20, 110, 10, 1600))
    router = frame.router
    assert (router.queued, router.running, router.requests_per_s, router.tokens_per_s) == (5, 7, 5.0, 50.0)
    assert router.cached_share == 0.25
    assert router.ttft_p50_s == pytest.approx(0.1)
    assert router.ttft_p95_s == pytest.approx(0.1 + 0.9 * 0.9)
    prefill, decode = frame.workers
    assert (prefill.used_share, prefill.cached_share, prefill.tokens_per_s) == (0.75, 0.6, 300.0)
    assert (decode.state, decode.cached_share, decode.tokens_per_s) == ("draining", None, None)
    (pair,) = frame.pairs
    assert (pair.sender, pair.receiver) == ("10.0.0.1:1", "gggggggg (gone)")
    assert (pair.mib, pair.mib_per_s, pair.tickets, pair.failures) == (4.0, 2.0, 4, 1)


def test_where_nothing_happened_times_are_of_all_requests() -> None:
    same = reading(10, 0, 100, 0, 0)
    frame = frame_between(same, reading(12, 0, 100, 0, 0))
    assert frame.router.requests_per_s == 0
    assert frame.router.ttft_p50_s == pytest.approx(0.05)
    assert frame.router.cached_share == 0.25


def test_a_restarted_router_has_no_negative_rates() -> None:
    frame = frame_between(reading(10, 5 << 20, 100, 0, 900), reading(12, 0, 1, 0, 0))
    assert (frame.router.requests_per_s, frame.pairs[0].mib_per_s, frame.workers[0].tokens_per_s) == (0, 0, 0)


def test_the_picture_shows_workers_pairs_and_the_queue() -> None:
    console = Console(width=160, record=True)
    console.print(picture(frame_between(reading(10, 0, 100, 0, 1000), reading(12, 4 << 20, 110, 10, 1600))))
    text = console.export_text()
    assert "queued 5  running 7  5.0 requests/s  50 tokens/s  first token 100 ms (95 %: 910 ms)  cached 25%" in text
    assert [line for line in text.splitlines() if "10.0.0.2:1" in line and "draining" in line and "75% of 100" in line]
    assert "gggggggg (gone)" in text


@pytest.fixture
def refusing() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if "fleet" in self.path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_key_that_is_missing_and_a_router_that_is_away(refusing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "--router", refusing]) == 2
    assert capsys.readouterr().err.startswith(f"tandem: --router: http://{refusing}/metrics/fleet needs a key: set TAN")
    assert run(["top", "--once", "--router", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("tandem: --router: no router answers at http://127.0.0.1:9: ")
    assert run(["top", "--every", "0s"]) == 2
    assert capsys.readouterr().err == "tandem: --every: must be more than 0 (got '0s')\n"


class Pages(BaseHTTPRequestHandler):
    """Answers with what the test says."""

    pages: dict[str, str]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.pages[self.path].encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(pages: dict[str, str]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), type("Own", (Pages,), {"pages": pages}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FLEET = {"object": "tandem.fleet", "workers": [], "pairs": []}


@pytest.mark.parametrize(
    ("fleet", "metrics"),
    [("<html>hello</html>", ""), ("[]", ""), ("{}", ""), (json.dumps(FLEET), "<html>it's {not metrics</html>")],
)
def test_an_answer_of_something_else_is_one_line(fleet: str, metrics: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/metrics/fleet": fleet, "/metrics": metrics, "/health": "{}"}) as address:
        assert run(["top", "--once", "--every", "1ms", "--router", address]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tandem: --router: http://{address}/metrics")
        assert line.endswith("; is it a Tandem router?")
        if metrics == "":
            assert run(["doctor", "--cluster", "--router", address]) == 1
            assert "is it a Tandem router?" in " ".join(capsys.readouterr().out.split())


def test_a_worker_page_of_something_else_is_left_out() -> None:
    with serving({"/metrics": "<html>it's {not metrics</html>"}) as other, serving({"/metrics": "a 1\n"}) as own:
        workers = [{"incarnation": "o", "metrics": other}, {"incarnation": "w", "metrics": own}]
        pages = {"/metrics/fleet": json.dumps({**FLEET, "workers": workers}), "/metrics": ""}
        with serving(pages) as router:
            read = FleetClient(router, ProcessConfig()).read()
    assert {name: dict(series) for name, series in read.workers.items()} == {"w": {"a": [({}, 1.0)]}}
