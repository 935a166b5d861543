"""GHSA-3f6c-7fw2-ppm4, CVE-2026-24779, CVE-2026-33626, CVE-2026-0599: no URL of a client's is ever opened."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from tests.security.rig import Front

URLS = ("http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]:{port}/", "http://127.0.0.1:{port}/a.png",
        "http://ok\\@127.0.0.1:{port}/", "file:///etc/passwd", "http://localhost:{port}/", "//127.0.0.1:{port}/",
        "data:image/png;base64,AAAA", "gopher://127.0.0.1:{port}/_x")  # fmt: skip


@pytest.mark.parametrize("url", URLS)
async def test_urls_are_not_fetched(url: str, anyone: httpx.AsyncClient, opened: Front, monkeypatch: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: asked.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    url = url.replace("{port}", "9")
    for part in (
        {"type": "image_url", "image_url": {"url": url}}, {"type": "input_audio", "input_audio": {"data": url}},
        {"type": "video_url", "video_url": {"url": url}}, {"type": "file", "file": {"file_id": url}},
    ):  # fmt: skip
        answer = await anyone.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert opened.dispatcher.requests == []
    for text in (f"![image]({url})", f"<img src='{url}'>"):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        assert (await anyone.post("/v1/chat/completions", json=body)).status_code == 200
    assert asked == []
