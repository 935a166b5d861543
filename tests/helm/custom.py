"""Objects of controllers that Kubernetes does not ship: held against their CRDs where there are some, or by structure.

The CRDs are other projects' and not in this repository. `CRD_DIR` names a folder with their YAML files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
NUMBER: Schema = {"type": "integer", "minimum": 1}
SELECTOR: Schema = {"type": "object", "properties": {"matchLabels": {"type": "object", "minProperties": 1}}}


def _map(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


TARGET = _map("apiVersion kind name", apiVersion=TEXT, kind=TEXT, name=TEXT)
STRUCTURE: dict[str, Schema] = {
    "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet": _map(
        "leaderWorkerTemplate",
        replicas=NUMBER,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=_map(
            "workerTemplate",
            size=NUMBER,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
            workerTemplate=_map("metadata spec"),
        ),
    ),
    "keda.sh/v1alpha1 ScaledObject": _map(
        "scaleTargetRef triggers",
        scaleTargetRef=TARGET,
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        triggers=_list(
            _map(
                "type metadata",
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=_map("serverAddress query threshold", serverAddress=TEXT, query=TEXT, threshold=TEXT),
                authenticationRef=_map("name", name=TEXT),
            )
        ),
    ),
    "monitoring.coreos.com/v1 ServiceMonitor": _map(
        "selector endpoints",
        selector=SELECTOR,
        endpoints=_list(_map("port authorization", port=TEXT, path=TEXT, interval=TEXT, authorization=_map("type"))),
    ),
    "monitoring.coreos.com/v1 PrometheusRule": _map(
        "groups", groups=_list(_map("name rules", name=TEXT, rules=_list(_map("expr"))))
    ),
    "gateway.networking.k8s.io/v1 HTTPRoute": _map(
        "parentRefs rules",
        parentRefs=_list(_map("name", name=TEXT)),
        rules=_list(_map("backendRefs", backendRefs=_list(_map("name", name=TEXT, port=NUMBER)))),
    ),
    "inference.networking.k8s.io/v1 InferencePool": _map(
        "selector targetPorts endpointPickerRef",
        selector=SELECTOR,
        targetPorts=_list(_map("number", number=NUMBER)),
        endpointPickerRef=_map(
            "name port", name=TEXT, port=_map("number"), failureMode={"enum": ["FailOpen", "FailClose"]}
        ),
    ),
}
GROUPS = {key.partition("/")[0] for key in STRUCTURE}


def check(described: dict[str, Any], crds: Path | None) -> None:
    """Raises ValueError, with the place, for an object that its controller would refuse."""
    key = f"{described['apiVersion']} {described['kind']}"
    schema = STRUCTURE.get(key)
    if schema is None:
        raise ValueError(f"{key} is not known here")
    whole = _map("metadata spec", spec=schema)
    if crds is not None:
        whole = read_crds(crds).get(key, {})
        if not whole:
            raise ValueError(f"CRD_DIR is {crds}; it has no CRD of {key}")
        whole = strict(whole)
    try:
        jsonschema.validate(described, whole)
    except jsonschema.ValidationError as error:
        raise ValueError(f"{error.json_path} {error.message}") from None


@cache
def read_crds(folder: Path) -> dict[str, Schema]:
    """`group/version Kind` -> openAPIV3Schema, of all CRDs in a folder's YAML files."""
    found = {}
    for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        for crd in yaml.safe_load_all(file.read_text()):
            if isinstance(crd, dict) and crd.get("kind") == "CustomResourceDefinition":
                spec = crd["spec"]
                for version in spec["versions"]:
                    name = f"{spec['group']}/{version['name']} {spec['names']['kind']}"
                    found[name] = version["schema"]["openAPIV3Schema"]
    return found


def strict(schema: Any) -> Any:
    """The schema with unknown fields as errors: a server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    closed = "properties" in schema and isinstance(schema.get("type"), str)
    if closed and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made
