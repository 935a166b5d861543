"""The chart rendered, and what is asked of its objects."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart, Config

from tandem.testing import kubernetes

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tandem"
EXAMPLES = tuple(sorted((CHART / "examples").glob("*.yaml")))
NAMES = [path.stem for path in EXAMPLES]
NAMESPACE = kubernetes.NAMESPACE

Object = dict[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Release:
    """Objects that one set of values gives."""

    values: Mapping[str, Any]
    objects: Sequence[Object]
    notes: str

    def of(self, *kinds: str) -> list[Object]:
        """All objects of these kinds."""
        return [each for each in self.objects if each["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object | None:
        """One object."""
        return next((each for each in self.of(kind) if each["metadata"]["name"] == name), None)

    def templates(self) -> list[Object]:
        """Pod templates of everything that runs on: routers and pools."""
        return [template_of(each) for each in self.of("Deployment", "StatefulSet", "LeaderWorkerSet")]

    def workers(self) -> list[Object]:
        """Of these, the pools'."""
        return [each for each in self.templates() if component(each) in ("prefill", "decode")]

    def routers(self) -> Object:
        """Of these, the routers'."""
        (found,) = (each for each in self.templates() if component(each) == "router")
        return found


def template_of(workload: Object) -> Object:
    """A workload's pod template, with the workload's name."""
    spec = workload["spec"]
    leader = spec.get("leaderWorkerTemplate")
    template: Object = spec["template"] if leader is None else leader["workerTemplate"]
    return {**template, "name": workload["metadata"]["name"]}


def component(template: Object) -> str:
    """What a pod is: router, prefill, decode or test."""
    return str(template["metadata"]["labels"].get("app.kubernetes.io/component", ""))


@cache
def _loaded() -> Chart:
    return Chart.load(CHART)


def render(values: Mapping[str, Any] | None = None, name: str = "demo", config: Config | None = None) -> Release:
    """The chart with these values. Raises HelmError when they are refused. config: a cluster for `lookup` to ask."""
    given = dict(values or {})
    if config is None:
        manifests = _loaded().render(given, name=name, namespace=NAMESPACE)
    else:
        manifests = config.render(_loaded(), given, name=name, namespace=NAMESPACE)
    notes = next(text for path, text in manifests.items() if path.endswith("NOTES.txt"))
    texts = [text for path, text in sorted(manifests.items()) if not path.endswith("NOTES.txt")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    return Release(given, objects, notes)


@cache
def example(name: str) -> Release:
    """One of the examples."""
    return render(yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text()))


def everything() -> dict[str, Any]:
    """Values that render every kind of object."""
    return {
        "serviceMonitor": {"enabled": True},
        "dashboards": {"enabled": True},
        "gateway": {
            "enabled": True,
            "parentRefs": [{"name": "public"}],
            "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
        },
        "tls": {"existingSecret": "tls", "name": "tandem.internal"},
        "discovery": {"mode": "registration"},
        "images": {"pullSecrets": [{"name": "registry"}]},
        "workers": {"priorityClassName": "high", "runtimeClassName": "nvidia", "rdma": {"enabled": True}},
        "pools": [
            {"name": "p", "role": "prefill", "gpus": 1, "autoscaling": {"kind": "hpa"}},
            {
                "name": "d",
                "role": "decode",
                "workload": "LeaderWorkerSet",
                "autoscaling": {"kind": "keda", "keda": {"serverAddress": "http://p:9090", "authenticationRef": "a"}},
            },
        ],
    }


def containers(template: Object) -> Iterator[Object]:
    """All containers of a pod."""
    spec = template["spec"]
    yield from (*spec.get("initContainers", ()), *spec["containers"])


def selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    """Whether a label selector matches. An empty one matches everything."""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In", "another operator needs more code here"
        exact = exact and labels.get(rule["key"]) in rule["values"]
    return exact


def secret_text(secret: Object, key: str) -> str:
    """A value of a Secret in clear."""
    return base64.b64decode(secret["data"][key]).decode()
