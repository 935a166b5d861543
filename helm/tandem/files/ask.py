"""Asks a router one question, as `helm test` does: `ask.py HOST:PORT KEYFILE`.

Ends with 0 and the answer, or with 1 and one line that says what is wrong.
"""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import Any

PATIENCE_S = 120
QUESTION = "What is Tandem?"


def call(address: str, key: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a route answers with. Raises ValueError for every status but 200."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    if answer.status != http.client.OK:
        raise ValueError(f"{path} was answered with {answer.status}: {text[:500]}")
    return json.loads(text)


def ask(address: str, key: str) -> str:
    """What the first model says. Raises ValueError when that is nothing."""
    model = call(address, key, "/v1/models")["data"][0]["id"]
    messages = [{"role": "user", "content": QUESTION}]
    answer = call(address, key, "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 32})
    text = answer["choices"][0]["message"]["content"]
    if not text or not answer["usage"]["completion_tokens"]:
        raise ValueError(f"the answer is empty: {answer}")
    return f"{model}: {text}"


if __name__ == "__main__":
    try:
        sys.stdout.write(ask(sys.argv[1], Path(sys.argv[2]).read_text().strip()) + "\n")
    except (OSError, ValueError, KeyError, IndexError, http.client.HTTPException) as error:
        sys.exit(f"no answer from {sys.argv[1]}: {error!r}")
