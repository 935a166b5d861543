"""What the tests of rules and dashboards share: where things are, promtool, and the expressions of all panels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARDS = ROOT / "deploy/grafana/dashboards"
RUNBOOKS = ROOT / "docs/runbooks"
needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="promtool and prometheus are not installed: apt-get install prometheus",
)


@dataclass(frozen=True)
class Alert:
    name: str
    severity: str
    expr: str
    rule: dict[str, Any]


def groups(name: str) -> list[dict[str, Any]]:
    """Rule groups of a file."""
    return list(yaml.safe_load((PROMETHEUS / "rules" / name).read_text())["groups"])


def alerts() -> list[Alert]:
    """All, in the order of the file."""
    return [
        Alert(rule["alert"], rule["labels"]["severity"], rule["expr"], rule)
        for group in groups("alerts.yaml")
        for rule in group["rules"]
    ]


def records() -> dict[str, str]:
    """Name -> expression."""
    return {rule["record"]: rule["expr"] for group in groups("recording.yaml") for rule in group["rules"]}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard's uid, panel), rows left out."""
    for file in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            if panel["type"] != "row":
                yield board["uid"], panel


def expressions() -> dict[str, str]:
    """Panel and query -> expression, with Grafana's variables as they are when nothing is chosen."""
    found = {}
    for uid, panel in panels():
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*").replace("$instance", ".*")
            assert "$" not in expr.replace('"$1"', ""), expr
            found[f"{uid}: {panel['title']} {target['refId']}"] = expr
    return found


def metric_names(expr: str) -> set[str]:
    """Names of series, of ours and of recorded ones."""
    return set(re.findall(r"\b(?:tandem[a-z0-9_:]*|process_[a-z_]+|up)\b(?!\")", re.sub(r'"[^"]*"', '""', expr)))
