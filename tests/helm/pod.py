"""A pod of the chart as its process sees it: files, variables, flags, and the settings that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer

from tandem.cli.app import make_app
from tandem.cli.options import build
from tandem.config import DecodeConfig, PrefillConfig, ProcessConfig, RouterConfig
from tests.helm.chart import Object, Release, containers, secret_text

PROCESSES: dict[str, type[ProcessConfig]] = {"router": RouterConfig, "prefill": PrefillConfig, "decode": DecodeConfig}
FIELDS = {"status.podIP": "10.1.2.3", "limits.cpu": "4"}
KEYS = "tenants: [{name: a, keys: [sk-a-key-of-a-tenant]}]"
LIBRARIES = {"HOME", "XDG_CACHE_HOME", "TMPDIR", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT"} | {
    *("UCX_TLS", "UCX_NET_DEVICES", "UCX_IB_GPU_DIRECT_RDMA", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME")
}


def place(release: Release, template: Object, root: Path) -> None:
    """Writes a pod's mounted ConfigMaps and Secrets below `root`."""
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    for mount in next(containers(template))["volumeMounts"]:
        volume, folder = volumes[mount["name"]], root / mount["mountPath"].strip("/")
        for name, text in _files(release, volume):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace(" /etc/", f" {root}/etc/"))


def _files(release: Release, volume: Object) -> Iterator[tuple[str, str]]:
    if "configMap" in volume:
        found = release.named("ConfigMap", volume["configMap"]["name"])
        assert found is not None, f"no ConfigMap {volume['configMap']['name']}"
        yield from found["data"].items()
    elif "secret" in volume:
        secret = release.named("Secret", volume["secret"]["secretName"])
        names = [(i["key"], i["path"]) for i in volume["secret"].get("items", ())]
        for key, path in names or [(name, name) for name in ("tls.crt", "tls.key", "ca.crt")]:
            yield path, KEYS if secret is None else secret_text(secret, key)


def environment(release: Release, container: Object, fields: Mapping[str, str] = FIELDS) -> dict[str, str]:
    """A container's variables, as Kubernetes would fill them in. fields: what is known of the pod."""
    found = {}
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "secretKeyRef" in source:
            secret = release.named("Secret", source["secretKeyRef"]["name"])
            outside = "a-secret-from-elsewhere"
            found[entry["name"]] = outside if secret is None else secret_text(secret, source["secretKeyRef"]["key"])
        elif source:
            reference = source.get("fieldRef", {}).get("fieldPath") or source["resourceFieldRef"]["resource"]
            found[entry["name"]] = fields[reference]
        else:
            found[entry["name"]] = entry["value"]
    return found


def command_line(container: Object, root: Path) -> list[str]:
    """A container's arguments, with its files below `root`."""
    return [each.replace("=/etc/", f"={root}/etc/") for each in container["args"]]


def started(release: Release, template: Object, root: Path, patch: pytest.MonkeyPatch) -> ProcessConfig:
    """The settings that the process in a pod would have. Raises ConfigError as it would."""
    place(release, template, root)
    (container,) = containers(template)
    for name, value in environment(release, container).items():
        patch.setenv(name, value)
    command, *flags = command_line(container, root)
    schema = PROCESSES[command]
    parser = typer.main.get_command(make_app())
    context = parser.commands[command].make_context(command, list(flags))  # type: ignore[attr-defined]
    return build(schema, {name: value for name, value in context.params.items() if value not in (None, (), [])})
