"""Log records in both forms, with the request's id."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from tandem import obs


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_records_end_with_the_request_id(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("info", "text")
    log = logging.getLogger("part")
    log.debug("not shown")
    log.info("outside")
    with obs.request_context("ab" * 16):
        log.warning("inside %d", 7)
    outside, inside = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    part: outside", outside)
    assert inside.endswith("WARNING part: inside 7 [" + "ab" * 16 + "]")


def test_json_records_are_objects_of_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("debug", "json")
    log = logging.getLogger("part")
    with obs.request_context("r1"):
        log.debug("two\nlines — é")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert first["message"] == "two\nlines — é"
    assert first["request_id"] == "r1"
    assert first["level"] == "debug"
    assert first["time"].endswith("+00:00")
    assert "ValueError: broken" in second["exception"]
    assert "request_id" not in second


def test_metric_names_follow_the_conventions() -> None:
    names = [value for name, value in vars(obs).items() if name.isupper() and isinstance(value, str)]
    assert len(names) > 10
    for name in names:
        assert re.fullmatch(r"tandem(_[a-z]+)+", name)
        assert not name.endswith(("_ms", "_kb", "_millis"))
