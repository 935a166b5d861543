"""A real Prometheus scrapes a running cluster under load: every expression of dashboards and alerts has data."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tandem.ports import free_ports
from tandem.testing.cluster import Cluster, cluster
from tandem.testing.polling import wait_for
from tests.deploy.monitoring import PROMETHEUS, ROOT, alerts, expressions, needs_prometheus, records

pytestmark = [needs_prometheus, pytest.mark.slow, pytest.mark.timeout(300)]
MODEL = ROOT / "tandem/demo/model"
LIMIT_S = 150.0
EMPTY = {"alert TandemNoRouter critical": "absent() of a router that is there"}
"""Expressions without data in a cluster that is well, and why."""
PICKER = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info")
"""What an endpoint picker of the Gateway API Inference Extension asks a model server for."""


@dataclass
class Watched:
    cluster: Cluster
    prometheus: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.prometheus}/api/v1/query", data={"query": expr}, timeout=20)
        assert answer.status_code == 200, f"{expr}: {answer.text}"
        return list(answer.json()["data"]["result"])

    def has_data(self, expr: str) -> bool:
        """Whether there is a series, and a number in it."""
        return any(math.isfinite(float(series["value"][1])) for series in self.query(expr))

    def firing(self) -> set[str]:
        found = httpx.get(f"{self.prometheus}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    def pages(self) -> dict[str, str]:
        """Component -> where its metrics are."""
        groups = json.loads(self.cluster.get("/metrics/targets"))
        found = {group["labels"]["component"]: f"http://{group['targets'][0]}" for group in groups}
        return {"router": self.cluster.url, **found}


def configuration(folder: Path, url: str) -> Path:
    """The one that is shipped, in a hurry, for this cluster."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        for found in job.get("http_sd_configs", ()):
            assert found["url"].startswith("http://127.0.0.1:8000/")
            found["url"], found["refresh_interval"] = found["url"].replace("http://127.0.0.1:8000", url), "1s"
    (folder / "targets").mkdir(parents=True)
    routers = (PROMETHEUS / "targets/routers.yaml").read_text()
    (folder / "targets/routers.yaml").write_text(routers.replace("127.0.0.1:8000", url.removeprefix("http://")))
    (folder / "rules").mkdir()
    for name in ("recording.yaml", "alerts.yaml"):
        text = (PROMETHEUS / "rules" / name).read_text()
        (folder / "rules" / name).write_text(re.sub(r"interval: \d+s", "interval: 1s", text))
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@contextlib.contextmanager
def prometheus(folder: Path, url: str) -> Iterator[str]:
    (port,) = free_ports(1)
    flags = {"config.file": configuration(folder, url), "storage.tsdb.path": folder / "data"}
    command = [f"--{name}={value}" for name, value in flags.items()] + [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(["prometheus", *command], stderr=log) as process:
        try:

            def ready() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
                return False

            wait_for(ready, (folder / "log").read_text, LIMIT_S)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextlib.contextmanager
def load(url: str) -> Iterator[None]:
    """Two clients, whose prompts share a beginning, until the end."""
    stop = threading.Event()

    def ask(seed: int) -> None:
        number = 0
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                number += 1
                own = [(seed * 7919 + number * 31 + at) % 900 + 3 for at in range(150)]
                body = {"prompt": [*range(3, 131), *own], "max_tokens": 8}
                client.post("/v1/completions", json=body)

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("monitored")
    alias = ["--metrics-alias", "vllm", "--served-model-name", "tandem-demo"]
    workers = [*alias, "--kv-mib", "16", "--draft-model", "demo"]
    with (
        cluster(MODEL, folder, worker_args=workers, router_args=alias) as running,
        prometheus(folder / "prometheus", running.url) as address,
    ):
        yield Watched(running, address)


def wanted() -> dict[str, str]:
    """All expressions by name. Comparisons give 0 or 1 instead of nothing, so that alerts show that they see data."""
    found = {f"record {name}": name for name in records()}
    found |= {
        f"alert {alert.name} {alert.severity}": re.sub(r" (>|<|==) ", r" \1 bool ", alert.expr) for alert in alerts()
    }
    return found | expressions()


def test_every_expression_has_data(watched: Watched) -> None:
    missing = wanted()
    empty = {name: missing.pop(name) for name in EMPTY}

    def all_found() -> bool:
        for name, expr in list(missing.items()):
            if watched.has_data(expr):
                del missing[name]
        return not missing

    with load(watched.cluster.url):
        wait_for(
            all_found, lambda: "no data: " + "\n".join(f"{name}: {expr}" for name, expr in missing.items()), LIMIT_S
        )
    filled = [name for name, expr in empty.items() if watched.query(expr)]
    assert filled == [], "these are not empty any more"


def test_pages_are_sound_and_documented(watched: Watched) -> None:
    documented = (ROOT / "docs/monitoring.md").read_text()
    pages = watched.pages()
    assert pages.keys() == {"router", "prefill", "decode"}
    for component, url in pages.items():
        page = httpx.get(f"{url}/metrics").text
        done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), component
        for family in text_string_to_metric_families(page):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            if name.startswith("tandem_") and not name.endswith("_created"):
                assert f"`{name}`" in documented, f"{name} of {component} is not in docs/monitoring.md"


def test_pickers_find_what_they_ask_for(watched: Watched) -> None:
    for component, url in watched.pages().items():
        page = httpx.get(f"{url}/metrics/vllm").text
        families = {family.name: family for family in text_string_to_metric_families(page)}
        for name in PICKER:
            (sample,) = families[f"vllm:{name}"].samples
            assert sample.labels["model_name"] == "tandem-demo", component
        for name in ("prefix_cache_queries", "prefix_cache_hits", "time_to_first_token_seconds"):
            assert families[f"vllm:{name}"].samples, component


def test_a_lost_worker_is_an_alert(watched: Watched) -> None:
    assert "TandemWorkersLost" not in watched.firing()
    watched.cluster.workers["prefill-0"].kill()
    wait_for(lambda: "TandemWorkersLost" in watched.firing(), lambda: f"only {watched.firing()} fire", LIMIT_S)
