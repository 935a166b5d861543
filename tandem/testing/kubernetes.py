"""A small Kubernetes API server: list and watch of pods over real HTTP, and all the ways in which a watch ends."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from ssl import SSLContext
from typing import Any, Literal

import yaml
from aiohttp import web

NAMESPACE = "serving"
PATH = "/api/v1/namespaces/{namespace}/pods"
Json = dict[str, Any]


def pod(
    name: str,
    ip: str,
    port: int,
    role: str = "decode",
    ready: bool = True,
    labels: Mapping[str, str] | None = None,
    uid: str = "",
) -> Json:
    """A pod as the API describes it; `port` is a container port named grpc."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": uid or f"uid-{name}",
            "labels": {"app": "tandem", "app.kubernetes.io/component": role, **(labels or {})},
        },
        "spec": {"containers": [{"name": "worker", "ports": [{"name": "grpc", "containerPort": port}]}]},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


@dataclass(frozen=True)
class Event:
    """One change of one pod; `version` is the whole store's after it."""

    version: int
    kind: str
    before: Json | None
    object: Json


@dataclass(eq=False)
class Watch:
    """One open watch: lines for it; None ends it."""

    labels: Mapping[str, str]
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    transport: asyncio.Transport | None = None


class KubernetesEmulator:
    """`start` and `stop` may be called again and again: the port stays the same, and so do the pods.

    gone_as: how a watch from a version that was compacted is refused. token: what callers must show. ssl: serve HTTPS.
    """

    def __init__(
        self, gone_as: Literal["status", "event"] = "event", token: str = "", ssl: SSLContext | None = None
    ) -> None:
        self.gone_as = gone_as
        self.token = token
        self.port = 0
        self.requests: list[dict[str, str]] = []
        """Parameters of all requests so far."""
        self.refuse: tuple[int, str] | None = None
        """Status and message of every answer from now on."""
        self._ssl = ssl
        self.version = 100
        """Of the whole store: each change has the next."""
        self._oldest = 100
        self._pods: dict[str, Json] = {}
        self._events: list[Event] = []
        self._watches: set[Watch] = set()
        self._runner: web.AppRunner | None = None

    # The server -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens, on the port of the last time."""
        app = web.Application()
        app.router.add_get(PATH, self._pods_of)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._ssl, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As if it were killed: connections break in the middle of whatever is said."""
        self.cut()
        while self._watches:  # noqa: ASYNC110 - their ends have been told
            await asyncio.sleep(0)
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    async def __aenter__(self) -> KubernetesEmulator:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'http' if self._ssl is None else 'https'}://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, namespace: str = NAMESPACE) -> Path:
        """Writes a kubeconfig that leads here."""
        cluster = {"server": self.url}
        context = {"cluster": "emulator", "user": "router", "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "emulator", "cluster": cluster}],
            "users": [{"name": "router", "user": {"token": self.token} if self.token else {}}],
            "contexts": [{"name": "here", "context": context}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    # The pods ---------------------------------------------------------------------------------------------------------

    def put(self, described: Json) -> None:
        """Creates a pod or changes it."""
        name = described["metadata"]["name"]
        self._change("MODIFIED" if name in self._pods else "ADDED", copy.deepcopy(described))

    def set_ready(self, name: str, ready: bool) -> None:
        """Changes a pod's readiness."""
        described = copy.deepcopy(self._pods[name])
        described["status"]["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
        self.put(described)

    def terminate(self, name: str) -> None:
        """What `kubectl delete` does first: the pod still is ready, and is to end."""
        described = copy.deepcopy(self._pods[name])
        described["metadata"]["deletionTimestamp"] = "2030-01-01T00:00:00Z"
        self.put(described)

    def delete(self, name: str) -> None:
        """The pod is gone."""
        self._change("DELETED", copy.deepcopy(self._pods[name]))

    def _change(self, kind: str, described: Json) -> None:
        name = described["metadata"]["name"]
        self.version += 1
        described["metadata"]["resourceVersion"] = str(self.version)
        event = Event(self.version, kind, self._pods.get(name), described)
        if kind == "DELETED":
            del self._pods[name]
        else:
            self._pods[name] = described
        self._events.append(event)
        for watch in self._watches:
            self._offer(watch, event)

    def described(self, name: str) -> Json:
        """A pod as it was told last."""
        return copy.deepcopy(self._pods[name])

    # What happens to watches ------------------------------------------------------------------------------------------

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._watches)

    def compact(self) -> None:
        """Forgets how it came to what is: watches from earlier versions are refused from now on."""
        self._oldest = self.version
        self._events.clear()

    def skip(self, versions: int = 10) -> None:
        """Other objects of the cluster change."""
        self.version += versions

    def bookmark(self) -> None:
        """Tells all watches how far they are."""
        self.say("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(self.version)}})

    def expire(self) -> None:
        """Ends all watches as those do that have fallen behind: with an error in the stream."""
        self.say("ERROR", _status(HTTPStatus.GONE, "too old resource version"))
        self.end()

    def end(self) -> None:
        """Ends all watches in order, as their time limit does."""
        for watch in self._watches:
            watch.lines.put_nowait(None)

    def cut(self) -> None:
        """Breaks the connections of all watches."""
        for watch in self._watches:
            if watch.transport is not None:
                watch.transport.abort()

    def say(self, kind: str, described: Json) -> None:
        """Sends an event to all watches, whatever is true."""
        self.say_line(_line(kind, described))

    def say_line(self, line: bytes) -> None:
        """Sends bytes to all watches."""
        for watch in self._watches:
            watch.lines.put_nowait(line)

    # Requests ---------------------------------------------------------------------------------------------------------

    async def _pods_of(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests.append(query)
        if self.refuse is not None:
            return _refusal(*self.refuse)
        if self.token and request.headers.get("authorization", "").lower() != f"bearer {self.token}".lower():
            return _refusal(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        if (namespace := request.match_info["namespace"]) != NAMESPACE:
            return _refusal(HTTPStatus.FORBIDDEN, f"pods is forbidden in the namespace {namespace}")
        try:
            labels = _selector(query.get("labelSelector", ""))
        except ValueError as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"unable to parse requirement: {error}")
        if query.get("watch", "").lower() == "true":
            return await self._watched(request, labels, int(query.get("resourceVersion", "0")))
        return self._listed(labels, int(query.get("limit", "500")), query.get("continue", ""))

    def _listed(self, labels: Mapping[str, str], limit: int, token: str) -> web.Response:
        """A page of the list; the token of the next one is the version and the place."""
        version, begin = (int(part) for part in token.split(":")) if token else (self.version, 0)
        if version < self._oldest or version > self.version:
            return _refusal(HTTPStatus.GONE, "the provided continue parameter is too old")
        found = [self._pods[name] for name in sorted(self._pods) if _fits(labels, self._pods[name])]
        more = len(found) > begin + limit
        metadata = {"resourceVersion": str(version), "continue": f"{version}:{begin + limit}" if more else ""}
        return web.json_response(
            {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": found[begin : begin + limit]}
        )

    async def _watched(self, request: web.Request, labels: Mapping[str, str], since: int) -> web.StreamResponse:
        gone = since < self._oldest
        if gone and self.gone_as == "status":
            return _refusal(HTTPStatus.GONE, f"too old resource version: {since} ({self._oldest})")
        answer = web.StreamResponse(headers={"content-type": "application/json"})
        answer.enable_chunked_encoding()
        watch = Watch(labels, transport=request.transport)
        if gone:
            text = f"too old resource version: {since} ({self._oldest})"
            watch.lines.put_nowait(_line("ERROR", _status(HTTPStatus.GONE, text)))
            watch.lines.put_nowait(None)
        for event in self._events:
            if event.version > since:
                self._offer(watch, event)
        self._watches.add(watch)
        try:
            await answer.prepare(request)
            while (line := await watch.lines.get()) is not None:
                await answer.write(line)
            await answer.write_eof()
        except ConnectionError:
            return answer
        finally:
            self._watches.discard(watch)
        return answer

    @staticmethod
    def _offer(watch: Watch, event: Event) -> None:
        """A change as one watch sees it: a pod whose labels no longer fit is deleted for it."""
        was = event.before is not None and _fits(watch.labels, event.before)
        fits = _fits(watch.labels, event.object) and event.kind != "DELETED"
        if was or fits:
            kind = "DELETED" if not fits else "MODIFIED" if was else "ADDED"
            watch.lines.put_nowait(_line(kind, event.object))


def _line(kind: str, described: Json) -> bytes:
    return json.dumps({"type": kind, "object": described}).encode() + b"\n"


def _status(code: int, message: str) -> Json:
    reason = "Expired" if code == HTTPStatus.GONE else HTTPStatus(code).phrase.replace(" ", "")
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _refusal(code: int, message: str) -> web.Response:
    return web.json_response(_status(code, message), status=code)


def _selector(text: str) -> dict[str, str]:
    """Of `a=b,c=d` only. Raises ValueError."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, equals, value in pairs:
        if not equals or not all(set(word) <= _WORD for word in (name, value)) or not name:
            raise ValueError(f"{name}{equals}{value}")
    return {name: value for name, _, value in pairs}


_WORD = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./")


def _fits(labels: Mapping[str, str], described: Json) -> bool:
    own = described["metadata"].get("labels", {})
    return all(own.get(name) == value for name, value in labels.items())
