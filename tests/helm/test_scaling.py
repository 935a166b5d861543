"""Scalers take over what runs, and ask for series that Prometheus really has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from helm_python.errors import HelmError

from tandem.worker.metrics import WorkerMetrics
from tests.helm.chart import NAMESPACE, Object, Release, render, selects
from tests.helm.cluster import cluster

KEDA: Object = {"kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
POOLS: list[Object] = [
    {"name": "p", "role": "prefill", "replicas": 3},
    {"name": "d", "role": "decode", "workload": "LeaderWorkerSet"},
]
NAMES = {"demo-tandem-p": "Deployment", "demo-tandem-d": "LeaderWorkerSet"}


def upgraded(live: Sequence[Object], autoscaling: Object) -> dict[str, Object]:
    """The pools' workloads, as Helm renders them on a cluster that runs these."""
    pools = [{**pool, "autoscaling": autoscaling} for pool in POOLS]
    with cluster(*live) as api:
        made = render({"pools": pools}, config=api)
    return {each["metadata"]["name"]: each for each in made.objects if each["metadata"]["name"] in workloads(each)}


def workloads(each: Object) -> set[str]:
    """The pools' names, if this object is a workload."""
    return {name for name, kind in NAMES.items() if each["kind"] == kind}


def running(replicas: int, annotations: Mapping[str, str]) -> list[Object]:
    """What a cluster says of both pools."""
    found = []
    for each in render({"pools": POOLS}).of("Deployment", "LeaderWorkerSet"):
        if each["metadata"]["name"] in NAMES:
            metadata = {**each["metadata"], "namespace": NAMESPACE, "annotations": dict(annotations)}
            found.append({**each, "metadata": metadata, "spec": {**each["spec"], "replicas": replicas}})
    return found


def test_the_chart_marks_the_numbers_that_it_gives() -> None:
    for each in render({"pools": POOLS}).of("Deployment", "LeaderWorkerSet"):
        if each["metadata"]["name"] in NAMES:
            assert each["metadata"]["annotations"] == {"tandem-replicas": "chart"}
            assert each["spec"]["replicas"] == (3 if each["kind"] == "Deployment" else 1)


@pytest.mark.parametrize(("kind", "replicas"), [("hpa", 3), ("keda", 0)])
def test_a_pool_keeps_its_workers_when_a_scaler_takes_over(kind: str, replicas: int) -> None:
    """Helm resets a field that the chart no longer has: three workers would be one."""
    live = running(replicas, {"tandem-replicas": "chart"})
    for _ in range(2):  # and at every later upgrade
        after = upgraded(live, {**KEDA, "kind": kind, "minReplicas": 2})
        assert after.keys() == NAMES.keys() and {each["spec"]["replicas"] for each in after.values()} == {replicas}
        live = list(after.values())


@pytest.mark.parametrize("live", [[], running(7, {"other": "x"})], ids=["new", "scaled"])
def test_a_pool_that_was_always_scaled_has_no_number(live: list[Object]) -> None:
    """Another one than the scaler's would be set at each upgrade, and at a rollback."""
    after = upgraded(live, KEDA)
    assert after.keys() == NAMES.keys()
    for each in after.values():
        assert "replicas" not in each["spec"] and "annotations" not in each["metadata"]


def test_secrets_that_are_not_there_are_named() -> None:
    account: Object = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mine"}}
    values: Object = {"secrets": {"existingSecret": "mine"}}
    with cluster(account) as api, pytest.raises(HelmError, match=f"is mine: namespace {NAMESPACE} has no such Secret"):
        render(values, config=api)
    with cluster(account, secret) as api:
        assert render(values, config=api).of("Secret") == []


def test_drawn_secrets_are_found_again() -> None:
    (drawn,) = render().of("Secret")
    with cluster(drawn) as api:
        (again,) = render(config=api).of("Secret")
    assert again["data"] == drawn["data"]


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
