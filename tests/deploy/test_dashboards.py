"""Dashboards are what the code makes, and can be used anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from deploy.grafana import generate
from tests.deploy.monitoring import DASHBOARDS, ROOT, metric_names, panels, records


def test_what_is_committed_is_what_is_generated(tmp_path: Path) -> None:
    generate.write(tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name: file.read_bytes() for file in DASHBOARDS.iterdir()} == made, "run `make dashboards`"


def test_every_panel_says_what_it_shows() -> None:
    titles = [(uid, panel["title"], panel["targets"][0]["expr"]) for uid, panel in panels()]
    assert len(titles) == len(set(titles)) > 60
    for uid, panel in panels():
        where = f"{uid}: {panel['title']}"
        assert len(panel["description"]) > 12 and panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert panel["datasource"]["uid"] == "${datasource}", where
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}" and target["legendFormat"], where
            assert 'model=~"$model"' in target["expr"], where
            counters = {name for name in metric_names(target["expr"]) if name.endswith("_total")}
            assert not counters or "rate(" in target["expr"] or "increase(" in target["expr"], where
            recorded = {name for name in metric_names(target["expr"]) if ":" in name}
            assert recorded <= records().keys(), where


def test_boards_are_stable_and_lead_to_one_another() -> None:
    for file in DASHBOARDS.iterdir():
        board = json.loads(file.read_text())
        assert board["uid"] == file.stem and board["tags"] == ["tandem"] and board["description"]
        assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "model", "instance"]
        assert board["links"][0]["tags"] == ["tandem"]
        places = [tuple(panel["gridPos"][axis] for axis in "xy") for panel in board["panels"]]
        assert len(places) == len(set(places))


def test_provisioning_names_what_is_there() -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    provider = yaml.safe_load((folder / "dashboards/tandem.yaml").read_text())["providers"][0]
    assert provider["type"] == "file" and provider["options"]["path"]
    source = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
