"""What `tandem up` shows: facts, in 80 columns, and a command that the shell takes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from tandem.cli.banner import Standing, banner, drafts_of
from tandem.cluster import Role, WorkerInfo
from tandem.config import UpConfig
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.types import ModelInfo

MODEL = ModelInfo("it's a model", "/m", "f" * 32, 1000, 131072)
LAYOUT = KvLayout((Plane("k", 2, 8, "bfloat16"), Plane("v", 2, 8, "bfloat16")), (LayerGroup((0, 1)),))
DECODE = WorkerInfo(
    incarnation="d" * 32,
    role=Role.DECODE,
    address="127.0.0.1:20001",
    model=MODEL,
    layout=LAYOUT,
    kv_dtype="bfloat16",
    page_size=16,
    total_pages=1048576,
    max_batch_tokens=512,
    transport="nixl",
    metrics_port=34567,
    threads=16,
    pid=4194304,
)
PREFILL = replace(DECODE, incarnation="e" * 32, role=Role.PREFILL, address="127.0.0.1:20002", pid=77)


def test_every_process_has_a_line_in_80_columns() -> None:
    standing = Standing("127.0.0.1", 8000, 4194303, "/models/m", [("prefill-0", PREFILL), ("decode-10", DECODE)])
    text = banner(standing)
    assert max(map(len, text.splitlines())) <= 80
    assert "\n  topology      1 router, 1 prefill, 1 decode (disaggregated)\n" in text
    assert "\n  model         it's a model, context 131072 tokens\n" in text
    assert "\n  KV            bfloat16, pages of 16 tokens\n  KV transport  nixl\n" in text
    assert "\n  compute       16 threads for each worker\n" in text
    assert "\n  listening on  http://127.0.0.1:8000 (loopback, no authentication)\n" in text
    assert "\n  router     127.0.0.1:8000   pid 4194303\n" in text
    assert "\n  prefill-0  127.0.0.1:20002  pid 77       1048576 pages  metrics 34567\n" in text
    assert "\n  decode-10  127.0.0.1:20001  pid 4194304  1048576 pages  metrics 34567\n" in text


def test_who_drafts_is_said() -> None:
    for settings, text in (
        ({}, ""),
        ({"speculative": "ngram", "draft_tokens": 5}, "prompt lookup, up to 5 tokens ahead"),
        ({"draft_model": "demo"}, "demo, up to 8 tokens ahead"),
        ({"draft_model": "demo", "draft_branches": 2}, "demo, trees of up to 8 tokens"),
    ):
        said = drafts_of(UpConfig(model="demo", **settings))
        assert said == text
        shown = banner(Standing("::1", 8000, 1, "/models/m", [("decode-0", DECODE)], drafts=said))
        assert (f"\n  drafts        {text}\n" in shown) == bool(text)


def test_the_aggregated_form_moves_nothing() -> None:
    text = banner(Standing("::1", 8000, 1, "/models/m", [("decode-0", DECODE)]))
    assert "1 router, 0 prefill, 1 decode (aggregated: decode workers prefill locally)" in text
    assert "\n  KV transport  none needed\n" in text
    assert "\n  metrics       http://[::1]:8000/metrics\n" in text


def test_the_request_to_paste_is_one_shell_command() -> None:
    text = banner(Standing("127.0.0.1", 8000, 1, "/models/m", [("decode-0", DECODE)]))
    command = text[text.index("curl") : text.index("\n\nCtrl-C")]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert words[3:6] == ["-H", "content-type: application/json", "-d"]
    body = json.loads(words[6])
    assert (body["model"], body["stream"]) == ("it's a model", True)
    assert body["messages"] == [{"role": "user", "content": "What is Tandem?"}]
    assert len(words) == 7
