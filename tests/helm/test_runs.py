"""The pods of the chart as real processes, found over a Kubernetes API, asked by the pod of `helm test`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from tandem.config import child_environment
from tandem.ports import free_ports
from tandem.testing.kubernetes import KubernetesEmulator
from tests.helm.chart import CHART, NAMESPACE, Object, Release, component, containers, render, secret_text
from tests.helm.pod import FIELDS, command_line, environment, place

START_S = 90.0
POD_IPS = {"prefill": "127.0.0.2", "decode": "127.0.0.3"}


def values(http: int, worker: int, metrics: int) -> dict[str, Any]:
    """The CPU demo with free ports and little memory, without compiling kernels."""
    settings = {"kv_mib": 16, "threads": 1, "kernels": "torch", "drain_s": "5s"}
    return {
        **yaml.safe_load((CHART / "examples" / "kind-cpu-demo.yaml").read_text()),
        "ports": {"http": http, "worker": worker, "metrics": metrics},
        "router": {"service": {"port": http}},
        "workers": {"settings": settings},
    }


async def start(release: Release, template: Object, root: Path, **more: str) -> asyncio.subprocess.Process:
    """The process of a pod, with what Kubernetes would give it."""
    (container,) = containers(template)
    place(release, template, root)
    own = environment(release, container, {**FIELDS, "status.podIP": POD_IPS.get(component(template), "")})
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        own[name] = str(root)
    arguments = [sys.executable, "-m", "tandem.cli", *command_line(container, root)]
    with (root / "log").open("wb") as log:
        return await asyncio.create_subprocess_exec(*arguments, env=child_environment(own | more), stderr=log)


async def until(client: httpx.AsyncClient, url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    """Waits until `url` is answered with 200: what a probe does."""
    async with asyncio.timeout(START_S):
        while True:
            assert process.returncode is None, await asyncio.to_thread(log.read_text)
            try:
                if (await client.get(url)).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def test_the_chart_serves(tmp_path: Path) -> None:
    http, worker, metrics = free_ports(3)
    release = render(values(http, worker, metrics))
    secret = release.named("Secret", "demo-tandem-secrets")
    assert secret is not None
    roots = {template["name"]: tmp_path / template["name"] for template in release.templates()}
    for root in roots.values():
        root.mkdir()
    processes = {}
    async with KubernetesEmulator() as api, httpx.AsyncClient() as client:
        config = api.kubeconfig(tmp_path / "kubeconfig", NAMESPACE)
        try:
            for template in release.templates():
                name = template["name"]
                processes[name] = await start(release, template, roots[name], KUBECONFIG=str(config))
            for template in release.workers():
                name, address = template["name"], POD_IPS[component(template)]
                api.put(described(template, address))
                await until(client, f"http://{address}:{metrics}/ready", processes[name], roots[name] / "log")
                api.set_ready(name, True)
                refused = await client.get(f"http://{address}:{metrics}/metrics")
                assert refused.status_code == httpx.codes.UNAUTHORIZED
            router = release.routers()["name"]
            await until(client, f"http://127.0.0.1:{http}/ready", processes[router], roots[router] / "log")
            assert "Tandem" in await asked(release, f"127.0.0.1:{http}", tmp_path / "key")
            told = await explained(client, f"http://127.0.0.1:{http}", secret)
            assert POD_IPS["decode"] in told
        finally:
            for process in processes.values():
                if process.returncode is None:
                    process.terminate()
            codes = {name: await process.wait() for name, process in processes.items()}
    assert codes == dict.fromkeys(processes, 0), [(root / "log").read_text()[-2000:] for root in roots.values()]


def described(template: Object, address: str) -> Object:
    """The pod as the API server tells of it, not yet ready."""
    metadata = {**template["metadata"], "name": template["name"], "namespace": NAMESPACE, "uid": template["name"]}
    conditions = [{"type": "Ready", "status": "False"}]
    status = {"phase": "Running", "podIP": address, "conditions": conditions}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": status}


async def explained(client: httpx.AsyncClient, url: str, secret: Object) -> str:
    """What `tandem explain` in a router's pod says of a request: the pod has the cluster's token and no API key."""
    question = {"model": "tandem-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    bearer = {"authorization": f"Bearer {secret_text(secret, 'api-key')}"}
    answer = await client.post(f"{url}/v1/chat/completions", json=question, headers=bearer)
    command = [sys.executable, "-m", "tandem.cli", "explain", answer.headers["x-request-id"], "--url", url, "--json"]
    own = child_environment({"TANDEM_TOKEN": secret_text(secret, "token")})
    process = await asyncio.create_subprocess_exec(*command, env=own, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode()


async def asked(release: Release, address: str, key: Path) -> str:
    """What the pod of `helm test` prints when it asks this address."""
    (container,) = containers(release.of("Pod")[0])
    secret = release.named("Secret", "demo-tandem-secrets")
    assert secret is not None
    await asyncio.to_thread(key.write_text, secret_text(secret, "api-key"))
    script, _, file = container["args"]
    assert file.endswith("/key")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, address, str(key), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, wrong = await process.communicate()
    assert process.returncode == 0, wrong.decode()
    return said.decode()
