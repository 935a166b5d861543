"""Every example is linted and rendered, and every object is one that Kubernetes knows."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import chart as helm_chart
from kubernetes_validate import utils

from tests.helm.chart import CHART, EXAMPLES, NAMES, ROOT, Release, everything, example, render
from tests.helm.custom import GROUPS, check

VERSIONS = ("1.31", "1.34", "1.37")


@pytest.fixture(autouse=True)
def _quick_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validator reads megabytes of JSON for each object; here it reads them once."""
    monkeypatch.setattr(utils, "schema_contents", SCHEMAS)


SCHEMAS = cache(utils.schema_contents)


def faults(release: Release, version: str, crds: Path | None = None) -> list[str]:
    """What Kubernetes would say to a release's objects."""
    found = []
    for each in release.objects:
        name = f"{each['kind']} {each['metadata']['name']}"
        try:
            if each["apiVersion"].partition("/")[0] in GROUPS:
                check(each, crds)
            else:
                kubernetes_validate.validate(each, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            found.append(f"{name}: {getattr(error, 'json_path', '')} {error.message}")
        except ValueError as error:
            found.append(f"{name}: {error}")
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_is_linted(path: Path) -> None:
    for version in VERSIONS:
        said = helm_chart.lint(CHART, yaml.safe_load(path.read_text()), strict=True, kube_version=f"{version}.0")
        assert said["errors"] == []
        assert [each for each in said["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_valid(name: str, version: str, crds: Path | None) -> None:
    assert faults(example(name), version, crds) == []


def test_every_kind_is_rendered_and_valid(crds: Path | None) -> None:
    release = render(everything())
    assert {each["apiVersion"].partition("/")[0] for each in release.objects} >= GROUPS
    assert faults(release, VERSIONS[0], crds) == faults(release, VERSIONS[-1], crds) == []


def test_a_wrong_object_is_caught() -> None:
    release = render(everything())
    spoilt: dict[str, tuple[str, Any]] = {
        "Deployment": ("replicass", 1),
        "NetworkPolicy": ("policyTypes", "Ingress"),
        "LeaderWorkerSet": ("leaderWorkerTemplate", {"size": 1}),
        "ScaledObject": ("triggers", []),
        "ServiceMonitor": ("selector", None),
        "InferencePool": ("targetPorts", 8000),
        "HTTPRoute": ("parentRefs", "public"),
    }
    for kind, (key, value) in spoilt.items():
        first = release.of(kind)[0]
        wrong = {**first, "spec": {**first["spec"], key: value}}
        assert len(faults(Release({}, [wrong], ""), VERSIONS[1])) == 1, kind


CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
spec:
  group: keda.sh
  names: {kind: ScaledObject}
  versions:
    - name: v1alpha1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [scaleTargetRef, patience]
              properties:
                patience: {x-kubernetes-int-or-string: true, type: string}
                scaleTargetRef: {type: object, x-kubernetes-preserve-unknown-fields: true}
"""


def test_objects_are_held_against_crds_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "crd.yaml").write_text(f"kind: Namespace\n---{CRD}")

    def said(kind: str = "ScaledObject", **spec: Any) -> list[str]:
        version = "keda.sh/v1alpha1" if kind == "ScaledObject" else "monitoring.coreos.com/v1"
        described = {"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "spec": spec}
        return [fault.partition(": ")[2] for fault in faults(Release({}, [described], ""), VERSIONS[1], tmp_path)]

    target = {"name": "b", "whatever": 1}
    assert said(scaleTargetRef=target, patience=3) == said(scaleTargetRef=target, patience="3s") == []
    assert said(scaleTargetRef=target) == ["$.spec 'patience' is a required property"]
    assert "'replicass' was unexpected" in said(scaleTargetRef=target, patience=3, replicass=1)[0]
    assert "[] is not valid" in said(scaleTargetRef=target, patience=[])[0]
    assert said("ServiceMonitor") == [
        f"CRD_DIR is {tmp_path}; it has no CRD of monitoring.coreos.com/v1 ServiceMonitor"
    ]


def test_the_values_that_the_guide_gives_are_taken(crds: Path | None) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (block,) = re.findall(r"```yaml\n(# my-values\.yaml\n.*?)```", text, flags=re.DOTALL)
    release = render(yaml.safe_load(block), name="tandem")
    pools = {each["metadata"]["name"]: each["spec"]["replicas"] for each in release.of("Deployment")}
    assert pools == {"tandem-router": 1, "tandem-prefill": 4, "tandem-decode": 2}
    assert faults(release, VERSIONS[1], crds) == []


def test_names_are_unique_and_short() -> None:
    release = render(everything(), name="a-release-with-a-name-that-is-fairly-long-indeed")
    names = [(each["kind"], each["metadata"]["name"]) for each in release.objects]
    assert len(names) == len(set(names))
    assert max(len(name) for _, name in names) <= 63


def test_two_releases_share_a_namespace() -> None:
    names = [
        {(each["kind"], each["metadata"]["name"]) for each in render(name=release).objects} for release in ("a", "b")
    ]
    assert names[0] & names[1] == set()


def test_the_notes_name_what_was_made() -> None:
    notes = example("kind-cpu-demo").notes
    assert "service/demo-tandem 8000:80" in notes and "secret demo-tandem-secrets" in notes
    assert "2 decode worker(s), on CPUs" in notes
    assert "4 to 8 prefill worker(s), one GPU each, RDMA" in example("rdma-4-prefill-2-decode").notes
    assert "WARNING" in render({"networkPolicy": {"enabled": False}}).notes
