"""Spans with given times arrive at a real receiver; a dead one harms nothing; off, nothing is imported."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tandem.cli.options import build
from tandem.cli.up import handed_on
from tandem.config import (
    DecodeConfig,
    DrainConfig,
    ProcessConfig,
    RouterConfig,
    UpConfig,
    WorkerConfig,
    child_environment,
)
from tandem.errors import ConfigError
from tandem.obs import tracer_of
from tandem.ports import free_ports
from tandem.testing.otlp import Collector, ReceivedSpan, as_text, collector, leaves, union_s
from tandem.testing.polling import wait_for
from tandem.tracing.otel import Event, Tracer, trace_id

ROOT = Path(__file__).resolve().parents[2]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)


@pytest.fixture
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


def tracer(received: Collector, share: float = 1.0) -> Tracer:
    return Tracer(received.url, share, "tandem-test", "i" * 32)


def test_times_attributes_events_and_failures_arrive(received: Collector) -> None:
    made, now = tracer(received), time.monotonic()
    wall = time.time()
    root = made.begin("root", now - 2.0, attributes={"a": 1, "none": None})
    made.add("step", (now - 1.5, now - 0.5), root, {"list": ["x", "y"]}, [Event("half", now - 1.0, {"why": "so"})])
    made.end(root, now, {"b": "two"}, failure="it broke")
    made.close()
    step, top = sorted(received.spans, key=lambda span: -span.began)
    assert (top.service, top.instance, top.name, top.parent_id) == ("tandem-test", "i" * 32, "root", "")
    assert (top.attributes, top.failed, top.failure) == ({"a": 1, "b": "two"}, True, "it broke")
    assert (step.parent_id, step.trace_id, step.attributes) == (top.span_id, top.trace_id, {"list": ["x", "y"]})
    assert (step.failed, [event[0] for event in step.events]) == (False, ["half"])
    assert top.seconds == pytest.approx(2.0, abs=1e-5)
    assert step.began - top.began == pytest.approx(0.5, abs=1e-5)
    assert step.events[0][1] - step.began == pytest.approx(0.5, abs=1e-5)
    assert abs(top.ended - wall) < 60, "times are Unix time"
    assert "  step" in as_text([top, step]) and "root  ! it broke" in as_text([top, step])


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False)])
def test_a_caller_decides_for_its_request(received: Collector, flags: str, sampled: bool) -> None:
    """Whatever the share is: 0 and 1 both follow the caller."""
    for share in (0.0, 1.0):
        made = tracer(received, share)
        span = made.begin("root", 1.0, (f"00-{TRACE}-{SPAN}-{flags}", "vendor=1"))
        parent, state = made.carried(span)
        assert span.is_recording() is sampled
        assert parent.startswith(f"00-{TRACE}-") is sampled and (state == "vendor=1") is sampled
        assert trace_id(span) == (TRACE if sampled else "")
        made.end(span, 2.0)
        made.close()
    assert [(each.trace_id, each.parent_id, each.state) for each in received.spans] == (
        [(TRACE, SPAN, "vendor=1")] * 2 if sampled else []
    )


@pytest.mark.parametrize(
    "parent", ["", "nonsense", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "\u00e9" * 55]
)
def test_a_malformed_parent_begins_a_trace(received: Collector, parent: str) -> None:
    made = tracer(received)
    span = made.begin("root", 1.0, (parent, "x" * 5000))
    assert span.is_recording()
    assert trace_id(span) != TRACE
    made.end(span, 2.0)
    made.close()
    assert received.spans[0].parent_id == ""


def test_a_long_tracestate_is_dropped_and_the_trace_goes_on(received: Collector) -> None:
    made = tracer(received)
    span = made.begin("root", 1.0, (f"00-{TRACE}-{SPAN}-01", ",".join(f"k{n}=v" for n in range(200))))
    assert (trace_id(span), made.carried(span)[1]) == (TRACE, "")
    made.close()


def test_the_share_decides_where_nobody_else_did(received: Collector) -> None:
    made = tracer(received, 0.5)
    sampled = sum(made.begin("root", 1.0).is_recording() for _ in range(400))
    assert 120 < sampled < 280
    made.close()
    assert not tracer(received, 0.0).begin("root", 1.0).is_recording()


def test_a_collector_that_is_not_there_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    made = Tracer(f"http://127.0.0.1:{port}", 1.0, "tandem-test", "i")
    with caplog.at_level(logging.INFO):
        for _ in range(5000):  # more than are kept
            made.end(made.begin("lost", 1.0), 2.0)
        made.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"traces do not reach http://127.0.0.1:{port}/v1/traces and are dropped; this is said once until they do"
    ]


def test_a_collector_that_comes_back_is_told_of(received: Collector, caplog: pytest.LogCaptureFixture) -> None:
    received.status = 400
    made = tracer(received)
    with caplog.at_level(logging.INFO):
        for count in range(1, 4):
            made.end(made.begin("lost", 1.0), 2.0)
            wait_for(lambda: received.refused >= count, lambda: "nothing was sent")  # noqa: B023
        received.status = 200
        wait_for(lambda: _arrives(made, received), lambda: "nothing arrives")
        made.close()
    assert ["reach" in record.getMessage() for record in caplog.records] == [True, True]
    assert caplog.records[1].getMessage().endswith("again")


def _arrives(made: Tracer, received: Collector) -> bool:
    made.end(made.begin("kept", 1.0), 2.0)
    return bool(received.spans)


def test_chains_are_counted_once_and_only_at_the_leaves() -> None:
    def span(name: str, began: float, ended: float, parent: str = "") -> ReceivedSpan:
        return ReceivedSpan("s", "i", name, "t", name, parent, 1, began, ended, {}, (), False, "", "")

    spans = [span("root", 0, 10), span("a", 1, 4, "root"), span("b", 3, 6, "root"), span("c", 8, 12, "root")]
    assert [each.name for each in leaves(spans)] == ["a", "b", "c"]
    assert union_s(leaves(spans), 0, 10) == pytest.approx(5 + 2)


NOT_IMPORTED = """
import asyncio, sys
from tandem.text.tokenizer import import_transformers_without_torch
import_transformers_without_torch()
import router.main
from router.control import ControlPlane
from tandem.config import RouterConfig
async def go():
    control = ControlPlane(RouterConfig(control_port=0))
    assert control.traces is None
    await control.close()
asyncio.run(go())
# transformers imports OpenTelemetry's light API where it finds it; nobody but us would the SDK and the exporter.
loaded = sorted(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) or
    name in ("tandem.tracing.otel", "router.tracing.requests"))
assert not loaded, loaded
"""
TRACING = {"tandem.tracing.otel", "tandem.worker.tracing", "decode_worker.tracing", "router.tracing.requests"}
"""What imports OpenTelemetry, directly or by another of these."""


def test_nothing_of_it_is_imported_when_it_is_off() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_IMPORTED], cwd=ROOT, env=child_environment({}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def loaded_at_once(text: str) -> set[str]:
    """What a module imports as soon as it is imported: not in functions, and not for type checkers alone."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_the_modules_that_trace_import_it_at_once() -> None:
    packages = ("tandem", "router", "decode_worker", "prefill_worker", "kvtransfer")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py") if "testing" not in file.parts]
    importers = set()
    for file in files:
        names = loaded_at_once(file.read_text())
        if names & TRACING or any(name.startswith("opentelemetry") for name in names):
            importers.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert importers == TRACING


@pytest.mark.parametrize("value", ["collector:4318", "ftp://host", "http://", "http://h:99999", "http://h:0", "x y"])
def test_a_wrong_endpoint_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^--otlp-endpoint: must be a URL such as [^\n]*$"):
        build(RouterConfig, {"otlp_endpoint": value})


def test_a_password_in_the_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="must not hold a password; OTEL_EXPORTER_OTLP_HEADERS may"):
        build(RouterConfig, {"otlp_endpoint": "http://user:word@host"})


@pytest.mark.parametrize("value", ["http://user:hidden@host", "http://hidden@host", "user:hidden@host:4318", "hidden"])
def test_a_wrong_endpoint_is_not_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_OTLP_ENDPOINT", value)
    with pytest.raises(ConfigError) as refused:
        build(RouterConfig, {})
    assert str(refused.value).startswith("--otlp-endpoint: must ")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_wrong_share_is_one_line(share: float) -> None:
    with pytest.raises(ConfigError, match=r"^--trace-share: [^\n]*$"):
        build(DecodeConfig, {"model": "m", "trace_share": share})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.config.process.OTLP_EXPORTER", "tandem-no-such-library")
    with pytest.raises(ValidationError, match=r"pip install 'tandem-serve\[otel\]'"):
        UpConfig(model="m", otlp_endpoint="http://h:1")
    assert UpConfig(model="m").otlp_endpoint == ""
    monkeypatch.setenv("TANDEM_OTLP_ENDPOINT", "http://h:1")
    with pytest.raises(ConfigError, match=r"^--otlp-endpoint: needs `pip install 'tandem-serve\[otel\]'`$"):
        build(RouterConfig, {})
    assert build(ProcessConfig, {}).token is None, "commands that trace nothing do not ask for it"
    assert build(DrainConfig, {"worker": "w"}).worker == "w"


@pytest.mark.parametrize(
    ("value", "library", "reason"),
    [
        ("http://shared:4318", "tandem-no-such-library", "needs `pip install 'tandem-serve[otel]'`"),
        ("shared:4318", None, "must be a URL such as http://collector:4318"),
        ("http://user:hidden@shared", None, "must not hold a password; OTEL_EXPORTER_OTLP_HEADERS may"),
    ],
)
def test_a_platforms_variable_that_cannot_be_used_stops_nothing(
    value: str, library: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", value)
    if library is not None:
        monkeypatch.setattr("tandem.config.process.OTLP_EXPORTER", library)
    for schema, given in ((RouterConfig, {}), (DecodeConfig, {"model": "m"}), (UpConfig, {"model": "m"})):
        built: Any = build(schema, given)
        assert built.otlp_endpoint == ""
    config = build(UpConfig, {"model": "m"})
    assert config.untraced() == f"nothing is traced: OTEL_EXPORTER_OTLP_ENDPOINT {reason}"
    child = RouterConfig(otlp_endpoint=config.otlp_endpoint)
    assert child.untraced() == "", "what `up` tells its children is said once, by itself"
    assert tracer_of(child, "tandem-router", "i") is None
    assert caplog.messages == []
    assert tracer_of(RouterConfig(), "tandem-router", "i") is None
    assert caplog.messages == [config.untraced()]


def test_the_variable_that_all_tools_share_is_read_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://shared:4318")
    assert RouterConfig().otlp_endpoint == "http://shared:4318"
    file = tmp_path / "settings.yaml"
    file.write_text("otlp_endpoint: http://file:4318\n")
    assert RouterConfig(config=file).otlp_endpoint == "http://file:4318"
    monkeypatch.setenv("TANDEM_OTLP_ENDPOINT", "http://own:4318")
    assert RouterConfig(config=file).otlp_endpoint == "http://own:4318"
    assert RouterConfig(otlp_endpoint="").otlp_endpoint == ""


def test_up_hands_it_to_its_children() -> None:
    config = UpConfig(model="m", otlp_endpoint="http://h:4318/v1/traces", trace_share=0.25, trace_prompts=True)
    for schema in (RouterConfig, WorkerConfig):
        flags = " ".join(handed_on(config, schema))
        assert "--otlp-endpoint http://h:4318/v1/traces --trace-share 0.25 --trace-prompts" in flags
    assert "--trace-prompts" not in handed_on(UpConfig(model="m"), RouterConfig)


def test_without_an_endpoint_there_is_no_tracer() -> None:
    assert tracer_of(RouterConfig(), "tandem-router", "i") is None
