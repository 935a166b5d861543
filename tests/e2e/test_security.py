"""A cluster with all its secrets, as an attacker on the same machine sees it: ports, logs, command lines, pages."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

TOKEN, FIRST, SECOND = "secret-token-of-the-cluster", "secret-key-of-a-tenant", "secret-key-of-another"
PROMPT = list(range(3, 203))


@dataclass
class Secured:
    running: Cluster
    folder: Path

    @property
    def processes(self) -> list[Process]:
        return [self.running.router, *self.running.workers.values()]

    def ask(self, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        fields = {"prompt": PROMPT, "max_tokens": 2, **body}
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(self.running.url + path, json=fields, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    model = make_checkpoint(folder / "tiny", CheckpointSpec(layers=2, vocab=300, max_positions=512))
    keys = folder / "keys.yaml"
    tenants = [{"name": "first", "keys": [FIRST]}, {"name": "second", "keys": [SECOND]}]
    keys.write_text(json.dumps({"tenants": tenants}))
    settings = ["--kv-mib", "4", "--log-level", "debug"]
    # A second decode worker is what a client could want to be sent to; who has the prefix is where it should go.
    asked = ["--api-keys", str(keys), "--log-level", "debug", "--policy", "longest_prefix"]
    with cluster(model, folder, 1, 2, worker_args=settings, router_args=asked, token=TOKEN) as running:
        yield Secured(running, folder)


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP port that a process listens on, from the kernel's own tables."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if (found := re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink()))) is not None:
                inodes.add(found[1])
    ports = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            host, _, port = fields[1].partition(":")
            if fields[3] == "0A" and fields[9] in inodes:
                words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                ports.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return ports


def ports_of(secured: Secured) -> dict[str, set[tuple[str, int]]]:
    """By process."""
    found = {}
    for process in secured.processes:
        assert process.popen is not None
        found[process.name] = listening(process.popen.pid)
    return found


def test_bind_all(secured: Secured) -> None:
    """CVE-2025-30202, CVE-2026-26220: only what is documented is listened on, and on loopback alone."""
    assert secured.ask(FIRST).status_code == 200  # every connection among them is made
    arguments = secured.running.router.arguments
    control = int(arguments[arguments.index("--control-port") + 1])
    for name, found in ports_of(secured).items():
        assert {host.removeprefix("::ffff:") for host, _ in found} == {"127.0.0.1"}, (name, found)
        ports = {port for _, port in found}
        if name == "router":
            assert ports == {secured.running.router.port, control}
        else:
            # gRPC, metrics, and the transport's own for each peer, where it has one
            role = name.split("-")[0]
            peers = sum(not other.startswith(role) for other in secured.running.workers)
            assert secured.running.workers[name].port in ports and 2 <= len(ports) <= 2 + peers


def canaries(folder: Path) -> list[bytes]:
    """Bytes that make a file when they are unpickled, or handed to a shell, plain and behind what ports expect."""
    command = f"touch {folder}/canary"
    text = f"cos\nsystem\n(S'{command}'\ntR.".encode()
    inner = command.encode()
    binary = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(inner)]) + inner + b"\x85R."
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n"
    made = []
    for each in (text, binary):
        made += [each, len(each).to_bytes(4, "big") + each, len(each).to_bytes(8, "little") + each, preface + each]
        made.append(head % (FIRST.encode(), len(each)) + each)
    return made


def test_pickle_on_the_wire(secured: Secured, tmp_path: Path) -> None:
    """ShadowMQ, CVE-2025-32444, CVE-2026-26220, CVE-2026-3059: what a port is sent is never run."""
    for found in ports_of(secured).values():
        for (_, port), data in ((each, data) for each in found for data in canaries(tmp_path)):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2.0) as connection:
                connection.settimeout(0.05)
                connection.sendall(data)
                connection.recv(4096)
    assert list(tmp_path.iterdir()) == []
    assert all(process.popen is not None and process.popen.poll() is None for process in secured.processes)
    for prompt in (PROMPT, [7] * 100):
        assert secured.ask(FIRST, prompt=prompt).status_code == 200


def cached(answer: httpx.Response) -> tuple[int, str]:
    """What a tenant is told of the cache: in the body, and in the header."""
    told = re.search(r"cached=(\d+);expected=(\d+)", answer.headers["x-tandem-route"])
    assert told
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"], f"{told[1]} {told[2]}"


def test_cross_tenant_cache(secured: Secured) -> None:
    """CVE-2025-46570, PROMPTPEEK: one tenant's prefixes are neither hit nor reported for another, whatever its salt."""
    prompt = [11, 13] * 100
    assert cached(secured.ask(FIRST, prompt=prompt)) == (0, "0 0")
    hit, told = cached(secured.ask(FIRST, prompt=prompt))
    assert hit >= 128 and told != "0 0"
    for salt in ({}, {"cache_salt": "first"}, {"cache_salt": '["first", ""]'}):
        assert cached(secured.ask(SECOND, prompt=prompt, **salt)) == (0, "0 0")
    assert cached(secured.ask(SECOND, prompt=prompt))[0] >= 128


def test_cross_tenant_explanations(secured: Secured) -> None:
    """Whether another tenant's request was there at all is not told."""
    name = secured.ask(FIRST).headers["x-request-id"]

    def explained(key: str, request_id: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{secured.running.url}/v1/explain/{request_id}", headers=headers).status_code

    assert (explained(FIRST, name), explained(SECOND, name), explained(SECOND, "0" * 32)) == (200, 404, 404)


def decode_worker(answer: httpx.Response) -> str:
    """The short id of the one that answered."""
    return answer.headers["x-tandem-route"].split(";")[0].removeprefix("decode=")


def test_client_controlled_headers(secured: Secured) -> None:
    """vllm #47843: no header of a client's steers anything, though there is another worker to be steered to."""
    secured.ask(FIRST)
    usual = decode_worker(secured.ask(FIRST))
    # Prompts that nobody has go to either.
    seen = (decode_worker(secured.ask(FIRST, prompt=[number] * 70)) for number in range(20, 60))
    other = next(name for name in seen if name != usual)
    address = f"127.0.0.1:{secured.running.workers['decode-0'].port}"
    for steers in ("x-tandem-route", "x-tandem-decode", "x-decode-worker", "x-gateway-destination-endpoint"):
        for value in (f"decode={other}", other, address):
            headers = {"authorization": f"Bearer {FIRST}", "tandem-token": "x", "x-tandem-request-id": "1" * 32}
            headers |= {steers: value, "x-tandem-tenant": "second", "x-prefiller-host-port": "127.0.0.1:1"}
            body = {"prompt": PROMPT, "max_tokens": 2}
            answer = httpx.post(secured.running.url + "/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] != "1" * 32 and "x-tandem-request-id" not in answer.headers
            assert decode_worker(answer) == usual and cached(answer)[0] >= 128, (steers, value)


def test_secrets_are_written_nowhere(secured: Secured) -> None:
    """Not in logs at the lowest level, not on command lines, in metrics or in error texts."""
    refused = secured.ask(SECOND + "-wrong").text
    page = secured.running.get("/metrics")
    written = {"refusal": refused, "metrics": page}
    for process in secured.processes:
        assert process.popen is not None
        written[f"log of {process.name}"] = process.log.read_text()
        written[f"command line of {process.name}"] = " ".join(psutil.Process(process.popen.pid).cmdline())
    for name, ports in ports_of(secured).items():
        for _, port in ports if name != "router" else ():
            with contextlib.suppress(httpx.HTTPError):
                written[f"page of {name}"] = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=1.0).text
    assert sum("tandem_worker_running" in text for text in written.values()) == len(secured.running.workers)
    for place, text in written.items():
        assert not [secret for secret in (TOKEN, FIRST, SECOND) if secret in text], place
        assert "secret-" not in text, place
