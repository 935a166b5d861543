"""`tandem explain`: what it prints of a story and of the ladder, and what it refuses."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tandem.cli.app import run
from tandem.cli.explain import fitted, ladder_of, ladder_table, story_tables
from tandem.errors import BadRequest
from tandem.ports import free_ports

PAGE = """# TYPE tandem_hit_ladder_tokens_total counter
tandem_hit_ladder_tokens_total{rung="prompt"} 1000.0
tandem_hit_ladder_tokens_total{rung="ideal"} 800.0
tandem_hit_ladder_tokens_total{rung="capacity"} 700.0
tandem_hit_ladder_tokens_total{rung="perfect_routing"} 650.0
tandem_hit_ladder_tokens_total{rung="achieved"} 600.0
"""
WORKER = {"id": "d" * 32, "address": "10.0.0.1:5000"}
STORY: dict[str, Any] = {
    "id": "a" * 32,
    "prompt_tokens": 300,
    "max_tokens": 16,
    "attempts": [
        {
            "at_ms": 1.5,
            "policy": "cost",
            "refusal": None,
            "candidates": [
                {
                    "decode": WORKER,
                    "prefill": None,
                    "decode_cached_tokens": 130,
                    "decode_matched_blocks": 2,
                    "prefill_cached_tokens": 0,
                    "prefill_matched_blocks": 0,
                    "costs": {"queue": 1.25, "prefill": 7.5},
                    "cost": 8.75,
                }
            ],
        }
    ],
    "copies": [
        {
            "source": WORKER,
            "target": {"id": "e" * 32, "address": None},
            "tokens": 192,
            "terms": {"worth": 88.5},
            "state": "failed",
            "error": "there are no pages for it",
            "moved_tokens": 0,
            "ms": 0.0,
        }
    ],
    "predicted": {"cached_tokens": 130, "first_token_ms": 8.75},
    "happened": {"state": "finished", "error": None, "prefill": None, "cached_tokens": 128, "first_token_ms": 11.0},
}


def shown(*parts: object) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(*parts)
    return out.getvalue()


def test_a_story_shows_costs_and_outcome() -> None:
    text = shown(*story_tables(STORY))
    for expected in ("dddddddd 10.0.0.1:5000", "130 (2 blocks)", "local", "1.25", "7.50", "8.75", "11.00", "128"):
        assert expected in text
    title = "192 tokens of its prefix copied to another worker: failed: there are no pages for it"
    assert title in " ".join(text.split())
    assert "eeeeeeee" in text
    assert "88.50" in text


TERMS = ("queue", "decode_load", "prefill_queue", "prefill", "transfer", "pressure", "eviction", "affinity")


def wide_story() -> dict[str, Any]:
    """Two candidates with more cost terms than a terminal of 80 columns has room for."""
    sends = {"id": "f" * 32, "address": "[fd00::1]:5001"}
    costs = {term: 18000.25 + number for number, term in enumerate(TERMS)}
    local = {**STORY["attempts"][0]["candidates"][0], "costs": costs, "cost": 144030.5}
    remote = {**local, "prefill": sends, "prefill_cached_tokens": 128000, "prefill_matched_blocks": 2000}
    return {**STORY, "attempts": [{**STORY["attempts"][0], "candidates": [local, remote]}]}


def narrow(*parts: Table | str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, soft_wrap=True, markup=False)
    for part in parts:
        console.print(fitted(part, console.width))
    return out.getvalue()


def test_numbers_stand_whole_in_a_narrow_terminal() -> None:
    text = narrow(*story_tables(wide_story()))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines() if line.startswith("  ")) <= 80
    words = text.split()
    for number, term in enumerate(TERMS):
        pairs = [words[at + 1] for at, word in enumerate(words[:-1]) if word == term]
        assert pairs.count(f"{18000.25 + number:.2f}") == 2
    for whole in ("sum 144030.50", "cached 128000 (2000 blocks)", "prefill ffffffff [fd00::1]:5001", "prefill local"):
        assert whole in text
    assert "first_token_ms" in text and "11.00" in text


def test_a_narrow_ladder_keeps_its_numbers() -> None:
    text = narrow(ladder_table(dict.fromkeys(ladder_of(PAGE), 123456789012)))
    assert "…" not in text and text.count("123456789012") == 5 and text.count("100.0%") == 5


def test_what_fits_stays_a_table() -> None:
    table = ladder_table(ladder_of(PAGE))
    assert fitted(table, 80) is table
    assert isinstance(fitted(table, 40), str)


def test_the_ladder_shows_shares_and_losses() -> None:
    rungs = ladder_of(PAGE)
    assert rungs == {"prompt": 1000, "ideal": 800, "capacity": 700, "perfect_routing": 650, "achieved": 600}
    lines = {line.split()[1]: line for line in shown(ladder_table(rungs)).splitlines() if "%" in line}
    assert "60.0%" in lines["achieved"] and " 5.0%" in lines["achieved"]
    with pytest.raises(BadRequest, match="no hit ladder"):
        ladder_of("# nothing\n")


@pytest.fixture
def router() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that knows one story and notes who asks."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("authorization")))
            known = self.path in ("/metrics", f"/v1/explain/{STORY['id']}")
            page = PAGE if self.path == "/metrics" else json.dumps({"requests": [STORY]})
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((page if known else '{"error": {"message": "not known"}}').encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_the_command_asks_the_router(
    router: tuple[str, list[tuple[str, str | None]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, asked = router
    monkeypatch.setenv("TANDEM_API_KEY", "k")
    assert run(["explain", "a" * 32, "--url", url, "--json"]) == 0
    monkeypatch.delenv("TANDEM_API_KEY")
    assert json.loads(capsys.readouterr().out)["requests"][0]["id"] == "a" * 32
    assert run(["explain", "--ladder", "--url", url]) == 0
    assert "perfect_routing" in capsys.readouterr().out
    assert asked == [(f"/v1/explain/{'a' * 32}", "Bearer k"), ("/metrics", None)]
    assert run(["explain", "b", "--url", url]) == 1
    assert f"--router: {url}/v1/explain/b answers 404: not known" in capsys.readouterr().err


def test_without_a_key_the_clusters_secrets_are_shown_where_they_count(
    router: tuple[str, list[tuple[str, str | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = router
    monkeypatch.setenv("TANDEM_TOKEN", "secret-of-sixteen")
    monkeypatch.setenv("TANDEM_METRICS_TOKEN", "of-metrics-readers")
    assert run(["explain", "a" * 32, "--url", url]) == 0
    assert run(["explain", "--ladder", "--url", url]) == 0
    assert [shown for _, shown in asked] == ["Bearer secret-of-sixteen", "Bearer of-metrics-readers"]


def test_a_router_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert run(["explain", "--ladder", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert capsys.readouterr().err.startswith(f"tandem: --router: no router answers at http://127.0.0.1:{port}: ")


def test_a_router_is_named_as_elsewhere(
    router: tuple[str, list[tuple[str, str | None]]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, asked = router
    for flag, address in (("--router", url.removeprefix("http://")), ("--router", url + "/"), ("--url", url[7:])):
        assert run(["explain", "--ladder", flag, address]) == 0
        assert "perfect_routing" in capsys.readouterr().out
    assert len(asked) == 3


def test_an_address_is_not_taken_for_markup(
    router: tuple[str, list[tuple[str, str | None]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, _ = router
    monkeypatch.setitem(STORY, "attempts", wide_story()["attempts"])
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["explain", "a" * 32, "--router", url]) == 0
    assert "prefill ffffffff [fd00::1]:5001" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["explain"], ["explain", "a", "--ladder"]])
def test_one_thing_at_a_time(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "either the id of a request or --ladder" in capsys.readouterr().err
