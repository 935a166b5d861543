"""The calls to Kubernetes' API server, by its official client. Imported only where Kubernetes is asked: `[k8s]`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, incluster_config, kube_config

from router.discovery.kubernetes_errors import ApiAway, ApiRefused, Expired
from tandem.errors import ConfigError

ANSWER_S = 5.0
"""For an answer to begin, and for a list to be read."""
WATCH_S = 45
"""The server ends a watch after so long, and this side soon after: no connection that died unseen blinds for longer."""
PAGE = 500
GONE = 410
NO_CONFIG = (
    "--kubernetes-selector is set; that needs a pod's service account (automountServiceAccountToken: true) or a "
    "kubeconfig (KUBECONFIG, or ~/.kube/config), and neither can be used"
)


class PodsApi:
    """Lists and watches the pods of one namespace that a selector fits."""

    def __init__(self, configuration: Any, namespace: str, selector: str) -> None:
        self.server = str(configuration.host)
        self.namespace = namespace
        self._selector = selector
        self._client = client.ApiClient(configuration)
        self._pods = client.CoreV1Api(self._client)

    @classmethod
    async def open(cls, namespace: str, selector: str) -> PodsApi:
        """Finds the API server: a pod's service account first, then a kubeconfig. Raises ConfigError.

        namespace: empty takes the pod's own, or that of the kubeconfig's context.
        """
        logging.getLogger("kubernetes").setLevel(logging.ERROR)  # what it warns of is in the errors here
        configuration = client.Configuration()
        try:
            try:
                incluster_config.load_incluster_config(configuration)
                own = Path(incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace")
                found = own.read_text().strip() if own.is_file() else ""
            except ConfigException:
                await kube_config.load_kube_config(client_configuration=configuration)
                _, context = kube_config.list_kube_config_contexts()
                found = context["context"].get("namespace") or ""
            return cls(configuration, namespace or found or "default", selector)
        except (ConfigException, OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{NO_CONFIG}: {error}", "kubernetes_selector") from None

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.close()

    async def list(self) -> tuple[list[dict[str, Any]], str]:
        """All pods, as the API describes them, and the version from which on to watch.

        Raises ApiRefused, ApiAway, and Expired when the list changed too much while it was read.
        """
        items: list[dict[str, Any]] = []
        token = ""
        while True:
            async with self._ask(ANSWER_S, limit=PAGE, **({"_continue": token} if token else {})) as answer:
                page = _object(await answer.read())
            metadata = page.get("metadata")
            if not isinstance(page.get("items"), list) or not isinstance(metadata, dict):
                raise ApiAway("what it answers is no list of pods")
            items += [item for item in page["items"] if isinstance(item, dict)]
            token = metadata.get("continue") or ""
            if not token:
                return items, str(metadata.get("resourceVersion", ""))

    async def watch(self, version: str) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Kind and object of each change after `version`, until the server ends the watch.

        Raises Expired when the server no longer knows that version, ApiRefused, ApiAway.
        """
        asked = {"watch": True, "allow_watch_bookmarks": True, "resource_version": version, "timeout_seconds": WATCH_S}
        async with self._ask(WATCH_S + ANSWER_S, **asked) as answer:
            while line := await _line(answer):
                event = _object(line)
                kind, described = event.get("type"), event.get("object")
                if not isinstance(kind, str) or not isinstance(described, dict):
                    raise Expired("what it sent is no event")
                if kind == "ERROR":
                    raise Expired(f"{described.get('code')} {described.get('message') or described.get('reason')}")
                yield kind, described

    @asynccontextmanager
    async def _ask(self, limit_s: float, **parameters: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        call = self._pods.list_namespaced_pod_without_preload_content
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await call(
                    self.namespace, label_selector=self._selector, _request_timeout=limit_s, **parameters
                )
            try:
                if answer.status >= 400:
                    raise _refusal(answer, await answer.read())
                yield answer
            finally:
                answer.close()
        except TimeoutError:
            raise ApiAway("it did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ApiAway(" ".join(str(error).split()) or type(error).__name__) from None
        except (ConfigException, client.ApiException) as error:  # its credentials are read again now and then
            raise ApiAway(" ".join(str(error).split())) from None


async def _line(answer: aiohttp.ClientResponse) -> bytes:
    try:
        return await answer.content.readline()
    except ValueError as error:
        raise Expired(f"an event is too long: {error}") from None


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> ApiRefused | Expired:
    try:
        status = json.loads(body)
    except ValueError:
        status = {}
    text = str(status.get("message") if isinstance(status, dict) else "") or str(answer.reason)
    if answer.status == GONE:
        return Expired(text)
    wait = answer.headers.get("retry-after", "")
    return ApiRefused(answer.status, text, float(wait) if wait.isascii() and wait.isdigit() else 0.0)


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiAway for anything else: a proxy's page, half a line of a connection that broke."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ApiAway("what it sends is no JSON object")
    return value
