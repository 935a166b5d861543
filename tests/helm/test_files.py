"""What of the chart is generated or copied is up to date, and values.yaml says every value."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import run
from sys import executable
from typing import Any, get_args

import pytest
import yaml

from tandem.config import DecodeConfig, PrefillConfig, ProcessConfig, RouterConfig
from tandem.testing import chart_schema
from tandem.testing.chart_values import Pool, TandemValues, Values, Workers
from tests.helm.chart import CHART, ROOT

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_what_is_generated_is_up_to_date() -> None:
    assert chart_schema.stale(ROOT) == [], "run `make helm-files`"


def test_what_is_out_of_date_is_caught_and_mended(tmp_path: Path) -> None:
    old = tmp_path / "helm/tandem/files/rules/gone.yaml"
    old.parent.mkdir(parents=True)
    old.write_text("groups: []")
    source = tmp_path / "deploy/grafana/dashboards/fleet.json"
    source.parent.mkdir(parents=True)
    source.write_text("{}")
    copy = "helm/tandem/files/dashboards/fleet.json"
    assert chart_schema.stale(tmp_path) == [copy, "helm/tandem/files/rules/gone.yaml", "helm/tandem/values.schema.json"]
    chart_schema.write(tmp_path)
    assert chart_schema.stale(tmp_path) == [] and (tmp_path / copy).read_text() == "{}" and not old.exists()


def test_every_setting_can_be_given_or_is_the_charts() -> None:
    given: dict[type[ProcessConfig], dict[str, Any]] = {
        RouterConfig: chart_schema.settings_schema(RouterConfig),
        PrefillConfig: chart_schema.settings_schema(PrefillConfig),
        DecodeConfig: chart_schema.settings_schema(DecodeConfig),
    }
    for config, schema in given.items():
        assert set(schema["properties"]) | chart_schema.OWNED >= set(config.model_fields)
        assert not set(schema["properties"]) & chart_schema.OWNED
        assert all("description" in field for field in schema["properties"].values())
    known = set().union(*(config.model_fields for config in given))
    assert known | {"kubernetes_namespace", "kubernetes_selector"} >= chart_schema.OWNED


def unsaid(model: type[Values], values: dict[str, Any], path: str = "") -> list[str]:
    """Values that values.yaml does not name, though a user may set them."""
    found = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key not in values:
            found.append(path + key)
            continue
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Values) and isinstance(values[key], dict) and values[key]:
                found += unsaid(inner, values[key], f"{path}{key}.")
    return found


def test_values_yaml_names_every_value() -> None:
    assert unsaid(TandemValues, VALUES) == []
    assert unsaid(Workers, {}) == [field.alias for field in Workers.model_fields.values()]
    assert set(Workers.model_fields) == set(Pool.model_fields) - {"name", "role"}


# The pod of `helm test` ---------------------------------------------------------------------------------------------


class Router(BaseHTTPRequestHandler):
    """Answers as a router would, with what a test prepared."""

    said: dict[str, tuple[int, str]] = {}
    heard: list[str] = []

    def do_GET(self) -> None:
        self.heard.append(f"{self.path} {self.headers['authorization']}")
        status, text = self.said[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET  # noqa: N815 - the base's name

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def router() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Router)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


MODELS = (200, '{"data": [{"id": "demo"}]}')
ANSWER = '{"choices": [{"message": {"content": "%s"}}], "usage": {"completion_tokens": %d}}'


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ((200, ANSWER % ("Tandem serves.", 3)), 0, "demo: Tandem serves."),
        ((200, ANSWER % ("", 0)), 1, "the answer is empty"),
        ((503, "no decode worker"), 1, "answered with 503: no decode worker"),
    ],
)
def test_the_test_pod_asks(router: str, tmp_path: Path, answer: tuple[int, str], code: int, said: str) -> None:
    Router.said = {"/v1/models": MODELS, "/v1/chat/completions": answer}
    Router.heard.clear()
    key = tmp_path / "key"
    key.write_text("sk-a\n")
    script = (CHART / "files" / "ask.py").read_text()
    done = run([executable, "-c", script, router, str(key)], capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert Router.heard == ["/v1/models Bearer sk-a", "/v1/chat/completions Bearer sk-a"]
