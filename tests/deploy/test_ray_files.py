"""The files for KubeRay: their structure, their commands, and that what the commands ask for is there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.on_ray.resources import Node, demands, fits
from tandem.cli.options import build
from tandem.config import UpConfig

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "ray"
CLUSTERS = ("raycluster.yaml", "autoscaling.yaml", "rayservice.yaml")
COMMANDS = {name: name for name in CLUSTERS[1:]} | {"rayjob.yaml": "raycluster.yaml"}
"""Where a command stands, and the cluster that it is for."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    (found,) = [one for one in documents(name) if one["kind"] in ("RayCluster", "RayService")]
    assert found["apiVersion"] == "ray.io/v1" and found["metadata"]["name"] == "tandem"
    return dict(found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterConfig"])


def serve_application() -> dict[str, Any]:
    (found,) = yaml.safe_load(documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])["applications"]
    return dict(found)


def command(name: str) -> list[str]:
    """What stands behind `tandem up`, in a comment or in an entrypoint."""
    text = (FOLDER / name).read_text()
    if name == "rayservice.yaml":  # the application adds where it runs
        return [*shlex.split(serve_application()["args"]["command"]), "--on", "ray"]
    if name == "rayjob.yaml":
        text = documents(name)[0]["spec"]["entrypoint"]
    else:
        text = text[: text.index("apiVersion")].replace("\n#", " ")
    return shlex.split(text[text.index("tandem up /") :])[2:]


def settings(name: str, folder: Path) -> UpConfig:
    """The command's settings, by the real schema; files of the cluster's are any file here."""
    keys = folder / "keys.yaml"
    keys.write_text("tenants: []\n")
    model, *flags = command(name)
    given: dict[str, Any] = {"model": model}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert flag.startswith("--")
        given[flag.removeprefix("--").replace("-", "_")] = str(keys) if value == "/etc/tandem/keys.yaml" else value
    return build(UpConfig, given)


def nodes(spec: dict[str, Any], most: bool) -> list[Node]:
    """The Ray nodes of a cluster, as KubeRay would start them. most: as many as the autoscaler may bring."""
    found = [Node("head", "h", {"CPU": float(spec["headGroupSpec"]["rayStartParams"]["num-cpus"])}, True)]
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        total = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}
        found += [Node("", "", total, False)] * group["maxReplicas" if most else "replicas"]
    return found


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_as_kuberay_wants_them(name: str) -> None:
    spec = cluster_spec(name)
    groups = spec["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    image = f"tandem-ray:{spec['rayVersion']}"
    for group in (spec["headGroupSpec"], *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["image"].endswith(image)
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    for group in groups:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert re.search(r"rayproject/ray:(\S+)-py", (FOLDER / "Dockerfile").read_text())[1] == spec["rayVersion"]  # type: ignore[index]


@pytest.mark.parametrize(("name", "of"), COMMANDS.items())
def test_commands_are_real_and_their_cluster_has_what_they_ask_for(name: str, of: str, tmp_path: Path) -> None:
    config, spec = settings(name, tmp_path), cluster_spec(of)
    assert config.on == "ray" and config.ray_address is None
    grows = bool(spec.get("enableInTreeAutoscaling"))
    there = nodes(spec, most=grows)
    wanted = demands(config, there)
    for role, count in (("prefill", config.prefill), ("decode", config.decode)):
        assert wanted[role][role] == 1
        assert sum(fits(wanted[role], node) for node in there) >= count
    assert config.ray_wait_s >= (300 if grows else 0)
    head = spec["headGroupSpec"]["template"]["spec"]
    assert config.drain_s < head["terminationGracePeriodSeconds"]
    services = [one["spec"] for one in documents(of) if one["kind"] == "Service"]
    assert [service["ports"][0]["targetPort"] for service in services] == (
        [] if name == "rayservice.yaml" else [config.port]
    )
    assert config.port in {port["containerPort"] for port in head["containers"][0]["ports"]}
    secrets = {entry["name"] for entry in head["containers"][0]["env"]}
    assert secrets == {"TANDEM_TOKEN", "TANDEM_METRICS_TOKEN"}


def test_the_job_finds_its_cluster() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    (cluster,) = [one for one in documents("raycluster.yaml") if one["kind"] == "RayCluster"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_the_service_names_a_real_application() -> None:
    module, _, name = serve_application()["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_what_the_readme_names_is_there() -> None:
    listed = re.findall(r"^\| `(\S+)` \|", (FOLDER / "README.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(file.name for file in FOLDER.iterdir() if file.name != "README.md")
