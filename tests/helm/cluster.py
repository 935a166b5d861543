"""As much of an API server as Helm's `lookup` asks: which resources there are, and one object at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helm_python import Config

from tests.helm.chart import NAMESPACE, Object

KINDS = {
    "v1": {"ServiceAccount": "serviceaccounts", "Secret": "secrets"},
    "apps/v1": {"Deployment": "deployments"},
    "leaderworkerset.x-k8s.io/v1": {"LeaderWorkerSet": "leaderworkersets"},
}


def _described() -> dict[str, Object]:
    """What the server says of itself, by path."""
    pages: dict[str, Object] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": []},
    }
    for version, kinds in KINDS.items():
        resources = [
            {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
            for kind, name in kinds.items()
        ]
        pages[_root(version)] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        group, _, short = version.rpartition("/")
        if group:
            one = {"groupVersion": version, "version": short}
            pages["/apis"]["groups"].append({"name": group, "versions": [one], "preferredVersion": one})
    return pages


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _path(item: Object) -> str:
    version, name = item["apiVersion"], item["metadata"]["name"]
    return f"{_root(version)}/namespaces/{NAMESPACE}/{KINDS[version][item['kind']]}/{name}"


@contextmanager
def cluster(*items: Object) -> Iterator[Config]:
    """A cluster that has these objects in the namespace, as Helm sees it."""
    pages: Mapping[str, Object] = {**_described(), **{_path(item): item for item in items}}

    class Server(BaseHTTPRequestHandler):
        """Answers from `pages`."""

        def do_GET(self) -> None:
            missing: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound"}
            page = pages.get(self.path.partition("?")[0])
            status = HTTPStatus.NOT_FOUND if page is None else HTTPStatus.OK
            body = json.dumps({**missing, "code": status.value} if page is None else page).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with Config(kube_apiserver=f"http://127.0.0.1:{server.server_port}", namespace=NAMESPACE) as config:
            yield config
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
