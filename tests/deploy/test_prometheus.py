"""The rules are sound, every alert fires and does not fire, and each has its runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from router.metrics import RouterMetrics
from tandem.cluster import Role
from tandem.engine.output import DraftOutcome
from tandem.testing.workers import fake_info
from tandem.worker.metrics import WorkerMetrics
from tests.deploy.monitoring import PROMETHEUS, ROOT, RUNBOOKS, alerts, metric_names, needs_prometheus, records


def promtool(*arguments: str | Path, stdin: bytes | None = None) -> str:
    """Its output; fails the test when it complains."""
    done = subprocess.run(["promtool", *map(str, arguments)], input=stdin, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@needs_prometheus
def test_rules_and_configurations_are_sound(tmp_path: Path) -> None:
    promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yaml")))
    folder = shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    promtool("check", "config", folder / "prometheus.yaml")
    guarded = folder / "prometheus-token.yaml"
    secret = tmp_path / "token"
    secret.write_text("a-token-for-metrics")
    text = guarded.read_text()
    assert text.count("credentials_file: /run/secrets/tandem-metrics-token") == 3
    guarded.write_text(text.replace("/run/secrets/tandem-metrics-token", str(secret)))
    promtool("check", "config", guarded)


@needs_prometheus
def test_every_alert_fires_and_does_not_fire() -> None:
    files = sorted((PROMETHEUS / "tests").glob("*.yaml"))
    promtool("test", "rules", *files)
    fires, quiet = set(), set()
    for file in files:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for at in case["alert_rule_test"]:
                expected = at["exp_alerts"]
                fires |= {(at["alertname"], alert["exp_labels"]["severity"]) for alert in expected}
                quiet |= set() if expected else {at["alertname"]}
    assert fires == {(alert.name, alert.severity) for alert in alerts()}
    assert quiet == {alert.name for alert in alerts()}


@needs_prometheus
def test_metrics_pages_keep_prometheus_conventions() -> None:
    """The pages of a running cluster: tests/e2e/test_monitoring.py."""
    worker = WorkerMetrics(list)
    worker.about(fake_info(Role.DECODE))
    worker.drafts.add(DraftOutcome("head", 4, 3))
    for page in (generate_latest(worker.registry), RouterMetrics().page().make()):
        assert promtool("check", "metrics", stdin=page) == ""


@needs_prometheus
def test_a_rule_that_is_broken_is_caught(tmp_path: Path) -> None:
    folder = shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    rules = folder / "rules/alerts.yaml"
    text = rules.read_text()
    assert text.count("tandem:worker_pages_used:ratio > 0.95") == 1
    rules.write_text(text.replace("tandem:worker_pages_used:ratio > 0.95", "tandem:worker_pages_used:ratio > 0.99"))
    done = subprocess.run(
        ["promtool", "test", "rules", folder / "tests/workers.yaml"], capture_output=True, check=False
    )
    assert done.returncode == 1 and b"TandemPagePressure" in done.stdout + done.stderr


def test_every_alert_has_its_runbook_and_nothing_else_has_one() -> None:
    names = {alert.name for alert in alerts()}
    assert {file.stem for file in RUNBOOKS.glob("*.md")} == names
    for alert in alerts():
        annotations = alert.rule["annotations"]
        assert annotations["runbook"] == f"docs/runbooks/{alert.name}.md"
        assert annotations["summary"] and annotations["description"].endswith(".")
        assert alert.severity in ("critical", "warning")


@pytest.mark.parametrize("name", sorted({alert.name for alert in alerts()}))
def test_a_runbook_says_what_it_must(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    for heading in ("What it means", "What users see", "Find the cause", "What to do"):
        body = text.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()
        assert len(body) > 15, heading
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (RUNBOOKS / link).exists(), link


def test_rules_record_what_alerts_use_and_nothing_in_vain() -> None:
    used = {name for alert in alerts() for name in metric_names(alert.expr) if ":" in name}
    boards = "".join(file.read_text() for file in (ROOT / "deploy/grafana/dashboards").glob("*.json"))
    assert used <= records().keys()
    in_vain = [name for name in records() if name not in used and name not in boards]
    assert in_vain == []


def test_the_table_of_alerts_is_complete() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| ([\w, ]+) \|", page, flags=re.M)
    severities: dict[str, list[str]] = {}
    for alert in alerts():
        severities.setdefault(alert.name, []).append(alert.severity)
    assert rows == [(name, name, ", ".join(each)) for name, each in severities.items()]
