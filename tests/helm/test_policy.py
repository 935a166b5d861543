"""What every pod and policy of the chart must be, whatever the values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import yaml

from router.discovery.pods import pod_of
from tests.helm.chart import (
    NAMES,
    NAMESPACE,
    Object,
    Release,
    component,
    containers,
    everything,
    example,
    render,
    selects,
    template_of,
)

REGISTRATION: dict[str, Any] = {"discovery": {"mode": "registration"}}
RELEASES: dict[str, Callable[[], Release]] = {
    "defaults": render,
    "everything": lambda: render(everything()),
    "registration": lambda: render(REGISTRATION),
    **{name: lambda name=name: example(name) for name in NAMES},  # type: ignore[misc]
}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
WELL_BEHAVED_S = 10
"""That a process needs, beside its drain, to say goodbye."""


@pytest.fixture(params=RELEASES, scope="module")
def release(request: pytest.FixtureRequest) -> Release:
    return RELEASES[str(request.param)]()


def pods(release: Release) -> Iterator[Object]:
    """Every pod that the release starts, the one of `helm test` included."""
    yield from release.templates()
    yield from release.of("Pod")


def insecure(pod: Object) -> list[str]:
    """What a pod or its containers may, and should not."""
    spec, found = pod["spec"], []
    whole = spec.get("securityContext", {})
    if not whole.get("runAsNonRoot") or whole.get("runAsUser", 0) < 1000:
        found.append("root")
    if whole.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("seccomp")
    if spec.get("automountServiceAccountToken") is not False and component(pod) != "router":
        found.append("token")
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        found.append("host")
    for container in containers(pod):
        own = container.get("securityContext", {})
        if own.get("runAsUser", 1000) < 1000 or own.get("privileged"):
            found.append("root")
        if not own.get("readOnlyRootFilesystem"):
            found.append("writable")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("escalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            found.append("capabilities")
    return found


def test_nothing_runs_as_root_or_writes_its_image(release: Release) -> None:
    assert {pod.get("name", "ask"): insecure(pod) for pod in pods(release)} == {
        pod.get("name", "ask"): [] for pod in pods(release)
    }


def test_an_insecure_pod_is_caught() -> None:
    bare: Object = {"metadata": {"labels": {}}, "spec": {"containers": [{"name": "a"}]}}
    assert set(insecure(bare)) == {"root", "seccomp", "token", "writable", "escalation", "capabilities"}


def test_capabilities_come_with_rdma_alone(release: Release) -> None:
    for pod in pods(release):
        for container in containers(pod):
            devices = container["resources"].get("limits", {})
            rdma = any(name.startswith("rdma/") for name in devices)
            assert container["securityContext"]["capabilities"].get("add") == (["IPC_LOCK"] if rdma else None)
            names = {entry["name"] for entry in container.get("env", ())}
            assert ("UCX_TLS" in names) is rdma


def test_every_folder_that_is_written_is_a_volume(release: Release) -> None:
    for template in release.templates():
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        for container in containers(template):
            mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
            environment = {each["name"]: each.get("value") for each in container["env"]}
            for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
                assert "emptyDir" in mounts[environment[name]]
            if component(template) != "router":
                assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert {each["name"] for c in containers(template) for each in c["volumeMounts"]} == set(volumes)


def test_probes_mean_different_things(release: Release) -> None:
    for template in release.templates():
        (container,) = containers(template)
        starts, ready, lives = (container[name] for name in PROBES)
        path = {name: container[name]["httpGet"]["path"] for name in PROBES}
        assert path["readinessProbe"] == "/ready" and path["livenessProbe"] == "/health"
        # A router is never ready before its workers: it must not be restarted for that. A worker has to be.
        assert path["startupProbe"] == ("/health" if component(template) == "router" else "/ready")
        patience = [probe["periodSeconds"] * probe["failureThreshold"] for probe in (starts, lives, ready)]
        assert patience == sorted(patience, reverse=True) and len(set(patience)) == 3
        assert patience[2] <= 10 < 60 <= patience[1]
        ports = {each["name"] for each in container["ports"]}
        assert {container[name]["httpGet"]["port"] for name in PROBES} <= ports


def test_endpoints_forget_a_pod_before_it_is_told_to_end(release: Release) -> None:
    for template in release.templates():
        for container in containers(template):
            waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert 1 <= waits < template["spec"]["terminationGracePeriodSeconds"] - WELL_BEHAVED_S


def test_services_do_not_become_settings(release: Release) -> None:
    """A Service called `tandem` would give every pod a variable TANDEM_PORT, which is a setting."""
    assert {pod["spec"].get("enableServiceLinks") for pod in pods(release)} == {False}


def labels_of(pod: Object) -> dict[str, str]:
    return dict(pod["metadata"]["labels"])


def test_selectors_select_what_they_are_for(release: Release) -> None:
    templates = {template["name"]: labels_of(template) for template in release.templates()}

    def selected(selector: Mapping[str, Any]) -> set[str]:
        assert selector.get("matchLabels") or selector.get("matchExpressions"), "an empty selector selects all"
        return {name for name, labels in templates.items() if selects(selector, labels)}

    workers = {name for name, labels in templates.items() if labels["app.kubernetes.io/component"] != "router"}
    routers = set(templates) - workers
    for workload in release.of("Deployment", "StatefulSet"):
        assert selected(workload["spec"]["selector"]) == {workload["metadata"]["name"]}
    for budget in release.of("PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]) == {budget["metadata"]["name"]}
    for service in release.of("Service"):
        name = service["metadata"]["name"]
        wanted = {name} if name in workers else routers
        assert selected({"matchLabels": service["spec"]["selector"]}) == wanted
    for policy in release.of("NetworkPolicy"):
        assert selected(policy["spec"]["podSelector"]) in (workers, routers)
    for pool in release.of("InferencePool"):
        assert selected(pool["spec"]["selector"]) == routers
    for template in release.templates():
        for spread in template["spec"].get("topologySpreadConstraints", ()):
            assert selected(spread["labelSelector"]) == {template["name"]}


def test_every_workload_has_a_budget_that_lets_nodes_drain(release: Release) -> None:
    budgets = {each["metadata"]["name"]: each["spec"] for each in release.of("PodDisruptionBudget")}
    assert set(budgets) == {template["name"] for template in release.templates()}
    assert {budget["maxUnavailable"] for budget in budgets.values()} == {1}


def test_monitors_scrape_ports_that_are_there(release: Release) -> None:
    services = release.of("Service")
    for monitor in release.of("ServiceMonitor"):
        spec = monitor["spec"]
        found = [each for each in services if selects(spec["selector"], each["metadata"]["labels"])]
        wanted = "http" if monitor["metadata"]["name"].endswith("router") else "metrics"
        assert found and all(wanted in {port["name"] for port in each["spec"]["ports"]} for each in found)
        for endpoint in spec["endpoints"]:
            assert endpoint["port"] == wanted
            assert endpoint["authorization"]["credentials"]["key"] == "metrics-token"


def test_service_ports_lead_to_container_ports(release: Release) -> None:
    for service in release.of("Service"):
        for template in release.templates():
            if selects({"matchLabels": service["spec"]["selector"]}, labels_of(template)):
                ports = {port["name"] for each in containers(template) for port in each["ports"]}
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_workers_reach_routers_that_are_not_ready() -> None:
    """A router is ready once it knows a decode worker; a Service of ready pods would keep them apart for ever."""
    control = render(REGISTRATION).named("Service", "demo-tandem-control")
    assert control is not None and control["spec"]["publishNotReadyAddresses"] is True


def test_only_who_asks_kubernetes_has_a_token(release: Release) -> None:
    bound = {subject["name"] for each in release.of("RoleBinding") for subject in each["subjects"]}
    for template in release.templates():
        spec = template["spec"]
        mounted = spec.get("automountServiceAccountToken") is not False
        assert mounted == (spec.get("serviceAccountName") in bound)
    assert release.of("ClusterRole", "ClusterRoleBinding") == []
    rules = [rule for role in release.of("Role") for rule in role["rules"]]
    assert rules in ([], [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}])


def test_routers_find_this_releases_workers_and_nobody_else() -> None:
    release = render()
    settings = release.named("ConfigMap", "demo-tandem-router")
    assert settings is not None
    selector = yaml.safe_load(settings["data"]["settings.yaml"])["kubernetes_selector"]
    wanted = {"matchLabels": dict(each.split("=") for each in selector.split(","))}
    assert all(selects(wanted, labels_of(template)) for template in release.workers())
    assert not any(selects(wanted, labels_of(template)) for template in render(name="other").workers())
    for template in release.workers():
        pod = {**template, "metadata": {**template["metadata"], "uid": "1", "name": "a"}}
        pod["status"] = {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
        found = pod_of(pod)
        assert found is not None and found.ready and found.role is not None
        assert (found.role.value, found.address) == (component(template), "10.0.0.1:7600")
    assert all(
        selects(wanted, labels_of(pod)) for pod in (release.routers(), release.of("Pod")[0])
    )  # and are no workers


def test_scalers_scale_what_is_there(release: Release) -> None:
    workloads = {(each["kind"], each["metadata"]["name"]): each for each in release.objects}
    scaled = {each["metadata"]["name"] for each in release.of("HorizontalPodAutoscaler", "ScaledObject")}
    for scaler in release.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        workload = workloads[target["kind"], target["name"]]
        assert workload["apiVersion"] == target["apiVersion"] and "replicas" not in workload["spec"]
    for workload in release.of("Deployment", "StatefulSet", "LeaderWorkerSet"):
        assert ("replicas" in workload["spec"]) != (workload["metadata"]["name"] in scaled)


def test_pods_start_anew_when_their_settings_change() -> None:
    def sums(values: dict[str, Any]) -> list[str]:
        return [t["metadata"]["annotations"]["checksum/settings"] for t in render(values).templates()]

    before, after = sums({}), sums({"router": {"settings": {"retries": 1}}})
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1
    assert all(old != new for old, new in zip(before, sums({"clusterKey": "other"}), strict=True))


# Who reaches whom ---------------------------------------------------------------------------------------------------

PROMETHEUS = ("monitoring", {"app": "prometheus"})
STRANGER = (NAMESPACE, {"app": "shell"})


def reaches(release: Release, source: tuple[str, Mapping[str, str]], target: Object, port: int | str) -> bool:
    """Whether the release's policies let a pod, by namespace and labels, open a connection to a port of another."""
    policies = [p for p in release.of("NetworkPolicy") if selects(p["spec"]["podSelector"], labels_of(target))]
    return not policies or any(
        _lets(rule, source, port) for policy in policies for rule in policy["spec"].get("ingress", ())
    )


def _lets(rule: Object, source: tuple[str, Mapping[str, str]], port: int | str) -> bool:
    if "ports" in rule and port not in [each["port"] for each in rule["ports"]]:
        return False
    return "from" not in rule or any(_is(peer, source) for peer in rule["from"])


def _is(peer: Object, source: tuple[str, Mapping[str, str]]) -> bool:
    namespace, labels = source
    if "namespaceSelector" in peer:
        return selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}) and selects(
            peer.get("podSelector", {}), labels
        )
    return namespace == NAMESPACE and selects(peer["podSelector"], labels)


def test_worker_ports_are_closed_to_all_but_routers_and_peers(release: Release) -> None:
    router = (NAMESPACE, labels_of(release.routers()))
    other = (NAMESPACE, labels_of(render(name="other").routers()))
    workers = release.workers()
    kv_port = 43210
    for worker in workers:
        assert reaches(release, router, worker, "grpc") and not reaches(release, router, worker, kv_port)
        for peer in workers:
            assert reaches(release, (NAMESPACE, labels_of(peer)), worker, kv_port)
        assert reaches(release, PROMETHEUS, worker, "metrics") and not reaches(release, PROMETHEUS, worker, "grpc")
        for stranger in (STRANGER, other, ("elsewhere", router[1])):
            assert [port for port in ("grpc", "metrics", kv_port) if reaches(release, stranger, worker, port)] == []


def test_the_control_port_is_for_workers_that_register() -> None:
    release = render(REGISTRATION)
    router = release.routers()
    assert not reaches(render(), (NAMESPACE, labels_of(release.workers()[0])), render().routers(), "control")
    for worker in release.workers():
        assert reaches(release, (NAMESPACE, labels_of(worker)), router, "control")
    for stranger in (STRANGER, PROMETHEUS, (NAMESPACE, labels_of(render(REGISTRATION, "other").workers()[0]))):
        assert not reaches(release, stranger, router, "control")


def test_clients_may_be_named() -> None:
    release = example("rdma-4-prefill-2-decode")
    router, asks = release.routers(), release.of("Pod")[0]
    assert reaches(render(), STRANGER, router, "http") and not reaches(release, STRANGER, router, "http")
    for source in (("gateway", {"a": "b"}), PROMETHEUS, (NAMESPACE, labels_of(asks))):
        assert reaches(release, source, router, "http")


@pytest.mark.parametrize("monitoring", [[], [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]])
@pytest.mark.parametrize("clients", [[], [{"podSelector": {"matchLabels": {"app": "shell"}}}]])
def test_peers_may_be_left_out(clients: list[Object], monitoring: list[Object]) -> None:
    release = render({"networkPolicy": {"clients": clients, "monitoring": monitoring}})
    router, worker = release.routers(), release.workers()[0]
    assert reaches(release, STRANGER, router, "http")
    assert reaches(release, (NAMESPACE, {"app": "other"}), router, "http") == (not clients)
    assert reaches(release, (NAMESPACE, labels_of(release.routers())), worker, "grpc")
    rules = [rule for each in release.of("NetworkPolicy") for rule in each["spec"]["ingress"]]
    assert sum(monitoring[0] in rule.get("from", ()) for rule in rules if monitoring) == bool(monitoring) + bool(
        clients and monitoring
    )
    assert all(rule["from"] for rule in rules if "from" in rule), "an empty list lets everybody in"


def test_an_open_policy_is_caught() -> None:
    release = render({"networkPolicy": {"enabled": False}})
    assert all(reaches(release, STRANGER, worker, "grpc") for worker in release.workers())


def test_images_are_pinned_by_tag_or_digest() -> None:
    digest = "sha256:" + "0" * 64
    release = render({"images": {"cpu": {"digest": digest}, "router": {"repository": "r.example/t", "tag": "v9"}}})
    used = {c["image"] for t in release.templates() for c in containers(t)}
    assert used == {f"tandem-cpu@{digest}", "r.example/t:v9"}
    assert all(":" in c["image"] and not c["image"].endswith(":latest") for p in pods(render()) for c in containers(p))


def test_pools_take_what_they_leave_out_from_workers() -> None:
    values = {
        "workers": {"gpus": 1, "settings": {"page_size": 32, "drain_s": 90}, "resources": {"limits": {"cpu": "4"}}},
        "pools": [
            {"name": "a", "role": "decode", "resources": {"limits": {"memory": "8Gi"}}},
            {"name": "b", "role": "decode", "gpus": 0, "settings": {"page_size": 1}, "image": {"tag": "t"}},
        ],
    }
    release = render(values)
    first, second = release.workers()
    (one,), (two,) = containers(first), containers(second)
    assert one["resources"]["limits"] == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert two["resources"]["limits"] == {"cpu": "4"} and (one["image"], two["image"])[1] == "tandem-cpu:t"
    assert one["image"].startswith("tandem-cuda:")
    texts = [release.named("ConfigMap", t["name"]) for t in (first, second)]
    assert ["page_size: 32" in str(text) for text in texts] == [True, False]
    assert first["spec"]["terminationGracePeriodSeconds"] == 5 + 90 + 15


def test_a_leader_worker_set_runs_the_same_pod() -> None:
    def pod(workload: str) -> Object:
        release = render({"pools": [{"name": "d", "role": "decode", "workload": workload}]})
        (found,) = (
            template_of(each) for each in release.of(workload) if not each["metadata"]["name"].endswith("router")
        )
        return found

    assert pod("Deployment") == pod("LeaderWorkerSet")
