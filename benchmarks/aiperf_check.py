"""Whether `aiperf` gets every answer at its full length from a cluster that afterwards holds nothing.

python -m benchmarks.aiperf_check --aiperf /path/to/venv/bin/aiperf [--concurrency 64] [--requests 200]

Starts one prefill and one decode worker, streams chats of mixed length with `ignore_eos`, then compares the completion
tokens that the server counted with those each request asked for, and audits every worker. `pip install aiperf` goes
into an environment of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tandem.config import child_environment
from tandem.hub import resolve_model
from tandem.testing.cluster import cluster

TOKENIZER = "local/tok"


def lay_out_tokenizer(model: Path, home: Path) -> None:
    """Makes the model's tokeniser loadable offline as `local/tok`: aiperf takes hub ids only."""
    repository = home / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    snapshot = repository / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("x")
    for pattern in ("*.json", "*.jinja"):
        for file in model.glob(pattern):
            shutil.copy(file, snapshot)


def profile(
    command: Path, folder: Path, model: Path, url: str, concurrency: int, requests: int
) -> list[dict[str, Any]]:
    """One run of aiperf; its raw record of each request. Raises CalledProcessError with its output on the terminal."""
    out = folder / "artifacts"
    lay_out_tokenizer(model, folder / "hf")
    subprocess.run(
        [
            str(command), "profile", "--model", model.name, "--url", url, "--endpoint-type", "chat", "--streaming",
            "--tokenizer", TOKENIZER, "--concurrency", str(concurrency), "--request-count", str(requests),
            "--synthetic-input-tokens-mean", "300", "--synthetic-input-tokens-stddev", "150",
            "--output-tokens-mean", "48", "--output-tokens-stddev", "24", "--extra-inputs", "ignore_eos:true",
            "--use-server-token-count", "--export-level", "raw", "--output-artifact-dir", str(out),
            "--random-seed", "7", "--ui", "none",
        ],
        check=True,
        env=child_environment({"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}),
    )  # fmt: skip
    return [json.loads(line) for line in (out / "profile_export_raw.jsonl").read_text().splitlines()]


def problem(record: dict[str, Any]) -> str:
    """What is wrong with one request, or an empty string."""
    if record.get("error") or record["status"] != 200:
        return f"status {record['status']}: {record.get('error')}"
    said = [packet["value"] for response in record["responses"] for packet in response["packets"]]
    chunks = [json.loads(value) for value in said if value != "[DONE]"]
    wanted = record["payload"].get("max_completion_tokens", record["payload"].get("max_tokens"))
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    if len(usages) != 1 or usages[0]["completion_tokens"] != wanted:
        return f"asked for {wanted} tokens, usage {usages}"
    finish = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return "" if finish == ["length"] else f"finish reasons {finish}"


def main(
    aiperf: Annotated[Path, typer.Option(help="the aiperf command")],
    model: Annotated[str, typer.Option(help="checkpoint folder, hub id or demo")] = "demo",
    concurrency: Annotated[int, typer.Option(help="requests under way at once")] = 64,
    requests: Annotated[int, typer.Option(help="requests in all")] = 200,
) -> None:
    """Runs, prints a summary and exits with 1 on any problem."""
    path, console = Path(resolve_model(model)), Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cluster(path, folder) as running:
            records = profile(aiperf, folder, path, running.url, concurrency, requests)
            running.check_leaks()
            audits = {name: running.audit(process) for name, process in running.workers.items()}
    problems = [found for record in records if (found := problem(record))]
    console.print(f"{len(records)} requests, {len(problems)} problems; left in the workers: {audits}")
    if problems or len(records) != requests:
        console.print("\n".join(problems[:20]))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
