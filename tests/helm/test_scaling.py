"""Scalers take over what runs, and ask for series that Prometheus really has."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from tandem.worker.metrics import WorkerMetrics
from tests.helm.chart import CHART, NAMESPACE, Object, Release, render, selects

KEDA: Object = {"kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
POOLS: list[Object] = [
    {"name": "p", "role": "prefill", "replicas": 3},
    {"name": "d", "role": "decode", "workload": "LeaderWorkerSet"},
]
Live = Callable[..., dict[str, Object]]


@pytest.fixture
def upgraded(tmp_path: Path) -> Live:
    """Workloads of the chart where `lookup`, which asks a cluster, finds one workload for every pool."""
    folder = tmp_path / "chart"
    shutil.copytree(CHART, folder)
    helpers = folder / "templates" / "_helpers.tpl"
    asks, answer = r"\{\{- lookup \$version [^}]*\}\}", "{{- .root.Values.live | toYaml -}}"
    text, number = re.subn(asks, answer, helpers.read_text())
    assert number == 1
    helpers.write_text(text)
    (folder / "values.schema.json").unlink()

    def rendered(live: Object, autoscaling: Object) -> dict[str, Object]:
        pools = [{**pool, "autoscaling": autoscaling} for pool in POOLS]
        manifests = Chart.load(folder).render({"pools": pools, "live": live}, name="demo", namespace=NAMESPACE)
        return _workloads(manifests[next(name for name in manifests if name.endswith("/pools.yaml"))])

    return rendered


def _workloads(text: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in yaml.safe_load_all(text) if each}


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_a_pool_keeps_its_workers_when_a_scaler_takes_over(upgraded: Live, kind: str) -> None:
    """Helm resets a field that the chart no longer has: three workers would be one."""
    before = {each["metadata"]["name"]: each for each in render({"pools": POOLS}).of("Deployment", "LeaderWorkerSet")}
    live = before["demo-tandem-p"]
    assert live["spec"]["replicas"] == 3
    for _ in range(2):  # and at every later upgrade
        after = upgraded(live, {**KEDA, "kind": kind, "minReplicas": 2})
        assert {each["spec"]["replicas"] for each in after.values()} == {3}
        live = {**after["demo-tandem-p"], "spec": {"replicas": 3}}


def test_scaled_to_nothing_stays_so(upgraded: Live) -> None:
    live = {"metadata": {"annotations": {"tandem-replicas": "chart"}}, "spec": {"replicas": 0}}
    assert {each["spec"]["replicas"] for each in upgraded(live, KEDA).values()} == {0}


@pytest.mark.parametrize("live", [{}, {"metadata": {"annotations": {"other": "x"}}, "spec": {"replicas": 7}}])
def test_a_pool_that_was_always_scaled_has_no_number(upgraded: Live, live: Object) -> None:
    """Another one than the scaler's would be set at each upgrade, and at a rollback."""
    for each in upgraded(live, KEDA).values():
        assert "replicas" not in each["spec"] and "annotations" not in each["metadata"]


# What KEDA asks Prometheus -------------------------------------------------------------------------------------------


def targets(release: Release) -> Iterator[tuple[str, dict[str, str]]]:
    """Workload and labels of each target that the ServiceMonitors give, by the Prometheus operator's rules."""
    for monitor in release.of("ServiceMonitor"):
        for service in release.of("Service"):
            if not selects(monitor["spec"]["selector"], service["metadata"]["labels"]):
                continue
            for template in release.templates():
                if selects({"matchLabels": service["spec"]["selector"]}, template["metadata"]["labels"]):
                    for endpoint in monitor["spec"]["endpoints"]:
                        if endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}:
                            yield template["name"], labels(service, template, endpoint)


def labels(service: Object, template: Object, endpoint: Object) -> dict[str, str]:
    """Labels of a pod that is found by a Service's endpoints: the operator's own, then those of `relabelings`."""
    found = {"namespace": NAMESPACE, "service": service["metadata"]["name"], "pod": f"{template['name']}-0"}
    meta = {
        "__meta_kubernetes_service_name": service["metadata"]["name"],
        **{
            "__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", name): value
            for name, value in template["metadata"]["labels"].items()
        },
    }
    for rule in endpoint["relabelings"]:
        assert rule.keys() <= {"sourceLabels", "targetLabel", "replacement"}, "another rule needs more code here"
        sources = rule.get("sourceLabels", ())
        found[rule["targetLabel"]] = ";".join(meta.get(s, "") for s in sources) if sources else rule["replacement"]
    return found


def series(query: str) -> list[tuple[str, dict[str, str]]]:
    """Names and matchers of all series that a query takes."""
    taken = re.findall(r"([a-z_]+)\{([^}]*)\}", query)
    return [(name, dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))) for name, matchers in taken]


def scaled() -> Release:
    pools = [{**pool, "autoscaling": KEDA} for pool in POOLS]
    return render({"pools": pools, "serviceMonitor": {"enabled": True}})


def test_scalers_ask_for_their_own_pools_series() -> None:
    release = scaled()
    found = list(targets(release))
    assert {name for name, _ in found} == {"demo-tandem-router", "demo-tandem-p", "demo-tandem-d"}
    for scaler in release.of("ScaledObject"):
        asked = [entry for trigger in scaler["spec"]["triggers"] for entry in series(trigger["metadata"]["query"])]
        assert len(asked) == 3
        for _, matchers in asked:
            wanted = {key: value for key, value in matchers.items() if key != "state"}
            assert wanted.keys() == {"namespace", "pool"}
            matched = {name for name, given in found if wanted.items() <= given.items()}
            assert matched == {scaler["spec"]["scaleTargetRef"]["name"]}


def test_scalers_ask_for_metrics_that_workers_have() -> None:
    release = scaled()
    known = {each.name for each in WorkerMetrics(tuple).registry.collect()}
    queries = [t["metadata"]["query"] for each in release.of("ScaledObject") for t in each["spec"]["triggers"]]
    names = {name for query in queries for name, _ in series(query)}
    assert names == {"tandem_worker_queued_tokens", "tandem_worker_pages"} and names <= known


def test_every_target_says_what_it_is() -> None:
    for name, given in targets(scaled()):
        role = {"demo-tandem-router": "router", "demo-tandem-p": "prefill", "demo-tandem-d": "decode"}[name]
        assert (given["component"], given["model"]) == (role, "tandem-demo")


def test_no_sleep_of_no_length() -> None:
    values: dict[str, Any] = {"router": {"preStopSeconds": 0}, "workers": {"preStopSeconds": 0}}
    for template in render(values).templates():
        assert all("lifecycle" not in container for container in template["spec"]["containers"])
        assert template["spec"]["terminationGracePeriodSeconds"] == 45
