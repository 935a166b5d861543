"""What a pod's description says of the worker in it."""

from __future__ import annotations

from typing import Any

import pytest

from router.discovery.pods import pod_of
from tandem.cluster import Role
from tandem.testing.kubernetes import pod


def test_a_ready_worker() -> None:
    found = pod_of(pod("a", "10.0.0.1", 9000, "prefill"))
    assert found is not None
    assert (found.address, found.role, found.ready, found.fault) == ("10.0.0.1:9000", Role.PREFILL, True, "")


@pytest.mark.parametrize(
    ("part", "change", "address", "why"),
    [
        ("status", {"conditions": []}, "10.0.0.1:9000", "it is not ready"),
        ("status", {"conditions": [{"type": "Ready", "status": "Unknown"}]}, "10.0.0.1:9000", "it is not ready"),
        ("status", {"phase": "Failed"}, "10.0.0.1:9000", "it has ended"),
        ("status", {"podIP": None}, "", "it has no address"),
        ("status", {"podIP": "10.0.0.1; rm"}, "", "it has no address"),
        ("metadata", {"deletionTimestamp": "2030-01-01T00:00:00Z"}, "10.0.0.1:9000", "it is being deleted"),
        ("metadata", {"annotations": {"tandem/grpc-port": "70000"}}, "", "its annotation tandem/grpc-port is '70000'"),
        ("metadata", {"annotations": {"tandem/grpc-port": "0"}}, "", "its annotation tandem/grpc-port is '0'"),
        ("spec", {"containers": [{"ports": [{"name": "http", "containerPort": 80}]}]}, "", "no container port named"),
        ("spec", {"containers": "none"}, "", "no container port named"),
    ],
)
def test_what_keeps_requests_away(part: str, change: dict[str, Any], address: str, why: str) -> None:
    described = pod("a", "10.0.0.1", 9000)
    described[part].update(change)
    found = pod_of(described)
    assert found is not None
    assert not found.ready
    assert found.address == address
    assert why in found.why


def test_an_annotation_counts_over_the_named_port() -> None:
    described = pod("a", "10.0.0.1", 9000)
    described["metadata"]["annotations"] = {"tandem/grpc-port": "9009"}
    found = pod_of(described)
    assert found is not None
    assert found.address == "10.0.0.1:9009"


@pytest.mark.parametrize("role", ["router", "", "Prefill", None])
def test_other_pods_are_no_workers(role: str | None) -> None:
    described = pod("a", "10.0.0.1", 9000)
    described["metadata"]["labels"]["app.kubernetes.io/component"] = role
    found = pod_of(described)
    assert found is not None
    assert (found.role, found.address, found.ready, found.fault) == (None, "", False, "")


@pytest.mark.parametrize("described", [{}, {"metadata": []}, {"metadata": {"name": "a"}}, {"metadata": {"uid": 1}}])
def test_what_is_no_pod(described: dict[str, Any]) -> None:
    assert pod_of(described) is None
