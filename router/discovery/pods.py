"""What a pod's description says of the worker in it. Pure; knows no client library."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.cluster import Role
from tandem.ports import authority

ROLE_LABEL = "app.kubernetes.io/component"
"""Its value is `prefill` or `decode`; pods with another one, such as routers, are no workers."""
PORT_NAME = "grpc"
"""Of the container port at which the worker listens."""
PORT_ANNOTATION = "tandem/grpc-port"
"""Counts over the named port."""


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod as it was described last."""

    uid: str
    name: str
    version: int | None
    """Its resourceVersion; None where that is no number and tells nothing of the order."""
    address: str = ""
    """host:port of the worker; empty while there is none."""
    role: Role | None = None
    """What its label says; None when it is no worker."""
    ready: bool = False
    """Whether new requests may go there."""
    why: str = ""
    """Why it is not ready, for the log."""
    fault: str = ""
    """What is wrong with a pod that looks like a worker and cannot be used as one."""


def pod_of(described: Mapping[str, Any]) -> Pod | None:
    """A pod from the API's JSON; None for what is none."""
    metadata, spec, status = (_mapping(described.get(part)) for part in ("metadata", "spec", "status"))
    uid, name = metadata.get("uid"), metadata.get("name")
    if not isinstance(uid, str) or not isinstance(name, str) or not uid:
        return None
    version = number_of(version_of(described))
    role = _role(_mapping(metadata.get("labels")).get(ROLE_LABEL))
    if role is None:
        return Pod(uid, name, version)
    port, fault = _port(_mapping(metadata.get("annotations")), spec)
    host = _host(status.get("podIP"))
    why = _unready(metadata, status) or ("it has no address" if not host else "")
    address = authority(host, port) if host and port else ""
    return Pod(uid, name, version, address, role, not why and not fault, why or fault, fault)


def version_of(described: Mapping[str, Any]) -> str:
    """An object's resourceVersion, or an empty text."""
    version = _mapping(described.get("metadata")).get("resourceVersion")
    return version if isinstance(version, str) else ""


def number_of(version: object) -> int | None:
    """A resourceVersion that can be compared with others, or None."""
    return int(version) if isinstance(version, str) and version.isascii() and version.isdigit() else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _entries(value: object) -> Sequence[Mapping[str, Any]]:
    return [_mapping(entry) for entry in value] if isinstance(value, list) else []


def _role(label: object) -> Role | None:
    return next((role for role in Role if role.value == label), None)


def _port(annotations: Mapping[str, Any], spec: Mapping[str, Any]) -> tuple[int, str]:
    """The port, or 0 and what is wrong."""
    given = annotations.get(PORT_ANNOTATION)
    if given is not None:
        port = number_of(given) or 0
        fault = f"its annotation {PORT_ANNOTATION} is {str(given)[:40]!r}; it must be a port, 1 to 65535"
        return (port, "") if 0 < port < 65536 else (0, fault)
    for container in _entries(spec.get("containers")):
        for listed in _entries(container.get("ports")):
            number = listed.get("containerPort")
            if listed.get("name") == PORT_NAME and isinstance(number, int) and 0 < number < 65536:
                return number, ""
    return 0, f"it has no container port named {PORT_NAME} and no annotation {PORT_ANNOTATION}"


def _host(address: object) -> str:
    try:
        return str(ipaddress.ip_address(address)) if isinstance(address, str) else ""
    except ValueError:
        return ""


def _unready(metadata: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """Why nothing new may go there, or an empty text."""
    if metadata.get("deletionTimestamp") is not None:
        return "it is being deleted"
    if status.get("phase") in ("Succeeded", "Failed"):
        return "it has ended"
    for condition in _entries(status.get("conditions")):
        if condition.get("type") == "Ready":
            return "" if condition.get("status") == "True" else "it is not ready"
    return "it is not ready"
