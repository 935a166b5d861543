"""What the chart tells the processes: all of it is a setting, and the process would start with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.admission.tenants import read_keys
from tandem.config import DecodeConfig, PrefillConfig, RouterConfig
from tandem.errors import ConfigError
from tests.helm.chart import NAMES, NAMESPACE, Release, component, containers, everything, example, render, secret_text
from tests.helm.pod import LIBRARIES, PROCESSES, started

RELEASES = {
    "defaults": {},
    "everything": everything(),
    "image": {"model": {"demo": False, "image": {"reference": "a:b"}, "servedName": "m"}},
}


@pytest.mark.parametrize("name", [*RELEASES, *NAMES])
def test_every_process_would_start(name: str, tmp_path: Path) -> None:
    release = render(RELEASES[name]) if name in RELEASES else example(name)
    for template in release.templates():
        with pytest.MonkeyPatch.context() as patch:
            config = started(release, template, tmp_path / template["name"], patch)
            spec = template["spec"]
            (container,) = containers(template)
            ports = {each["name"]: each["containerPort"] for each in container["ports"]}
            drain = spec["terminationGracePeriodSeconds"] - container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert drain >= config.drain_s + 10  # type: ignore[attr-defined]
            assert config.token is not None and config.metrics_token is not None
            if isinstance(config, RouterConfig):
                assert config.port == ports["http"] and (config.control_host == "0.0.0.0") == ("control" in ports)
                assert bool(config.kubernetes_selector) == ("control" not in ports)
                assert config.api_keys is not None and read_keys(config.api_keys).tenants
            else:
                assert isinstance(config, PrefillConfig | DecodeConfig)
                assert (config.host, config.port, config.metrics_port) == ("10.1.2.3", ports["grpc"], ports["metrics"])
                assert config.threads == 4
                gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu", "0")
                assert (config.device == "cuda") == (gpus != "0")


@pytest.mark.parametrize("name", [*RELEASES, *NAMES])
def test_every_variable_is_a_setting_or_a_known_librarys(name: str) -> None:
    release = render(RELEASES[name]) if name in RELEASES else example(name)
    for template in release.templates():
        schema = PROCESSES[component(template)]
        settings = {f"TANDEM_{field.upper()}" for field in schema.model_fields}
        names = [entry["name"] for container in containers(template) for entry in container["env"]]
        assert [each for each in names if each not in settings | LIBRARIES] == []
        assert len(names) == len(set(names))


def test_workers_and_routers_know_one_another(tmp_path: Path) -> None:
    values = {**example("two-models-b").values, "discovery": {"mode": "registration"}, "router": {"replicas": 2}}
    release = render(values)
    configs = []
    for template in release.templates():
        with pytest.MonkeyPatch.context() as patch:
            configs.append(started(release, template, tmp_path / template["name"], patch))
    by_kind: dict[type, Any] = {type(config): config for config in configs}
    router, worker = by_kind[RouterConfig], by_kind[DecodeConfig]
    assert (router.model, router.cluster_key, router.token) == (worker.model, worker.cluster_key, worker.token)
    assert Path(router.model).is_absolute()
    services = {each["metadata"]["name"] for each in release.of("Service")}
    pods = {
        f"{each['metadata']['name']}-{i}" for each in release.of("StatefulSet") for i in range(each["spec"]["replicas"])
    }
    hosts = [address.rpartition(":")[0].split(".") for address in worker.router]
    assert {host[0] for host in hosts} == pods and {host[1] for host in hosts} <= services
    assert all(host[2:] == [NAMESPACE, "svc"] for host in hosts)


def test_extra_arguments_count(tmp_path: Path) -> None:
    values = {
        "router": {"extraArgs": ["--policy", "round_robin"], "extraEnv": [{"name": "TANDEM_RETRIES", "value": "7"}]},
        "workers": {"settings": {"threads": 2}},
    }
    release = render(values)
    with pytest.MonkeyPatch.context() as patch:
        config = started(release, release.routers(), tmp_path, patch)
    assert isinstance(config, RouterConfig) and (config.policy, config.retries) == ("round_robin", 7)
    assert "TANDEM_THREADS" not in {entry["name"] for entry in next(containers(release.workers()[0]))["env"]}


@pytest.mark.parametrize("said", [0, 7.5, 240, "90", "2m30s", "1500ms", "0.1h"])
def test_the_grace_period_follows_the_drain(said: float | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = render({"router": {"settings": {"drain_s": said}}})
    config = started(release, release.routers(), tmp_path, monkeypatch)
    assert isinstance(config, RouterConfig)
    assert release.routers()["spec"]["terminationGracePeriodSeconds"] == 10 + math.ceil(config.drain_s) + 15


def test_what_is_no_setting_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = render()
    settings = release.named("ConfigMap", "demo-tandem-router")
    assert settings is not None
    text = yaml.safe_dump(yaml.safe_load(settings["data"]["settings.yaml"]) | {"worker_ports": 1})
    broken = {**settings, "data": {"settings.yaml": text}}
    spoilt = Release({}, [broken if each is settings else each for each in release.objects], "")
    with pytest.raises(ConfigError, match="worker_ports"):
        started(spoilt, spoilt.routers(), tmp_path, monkeypatch)


def test_drawn_secrets_are_strong_and_open_the_door(tmp_path: Path) -> None:
    first, second = (render().named("Secret", "demo-tandem-secrets") for _ in range(2))
    assert first is not None and second is not None
    texts = {key: secret_text(first, key) for key in first["data"]}
    assert texts.keys() == {"token", "metrics-token", "api-key", "keys.yaml"}
    assert all(texts[key] != secret_text(second, key) for key in texts)
    assert min(len(text) for text in texts.values()) >= 40
    (tmp_path / "keys.yaml").write_text(texts["keys.yaml"])
    assert read_keys(tmp_path / "keys.yaml").tenant(f"Bearer {texts['api-key']}", None).operator
    assert first["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_no_secret_is_drawn_where_one_exists() -> None:
    release = example("rdma-4-prefill-2-decode")
    assert release.of("Secret") == []
    names = {
        entry["valueFrom"]["secretKeyRef"]["name"]
        for template in release.templates()
        for container in containers(template)
        for entry in container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert names == {"tandem-production"}
