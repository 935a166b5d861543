"""What a request and a streamed token cost the router: process CPU seconds, beside a proxy under the same streams.

    python -m benchmarks.router_cost --peer PEERS/sglang-router/.venv/bin/python

The router is the real one, in front of two decode workers without an engine that send a token of each request every few
milliseconds; the peer stands in front of two HTTP servers that send the same events. Both get the same bodies by the
same client. A token's cost is the difference between long and short answers, a request's the cost of answers of one
token. `--idle N` instead opens N streams that get one token each, and reports the router's memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.systems import Server
from tandem.ports import free_ports
from tandem.text.tokenizer import Tokenizer, import_transformers_without_torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tandem/demo/model"
SHORT, LONG = 128, 1024
CONCURRENCIES = (16, 256)
REQUESTS = 256
"""Requests of one token, for each figure."""
EVENTS = 0.8
"""Events a token at least: tokens that are no whole character make none."""

app = typer.Typer(add_completion=False)


@dataclass
class Cost:
    """One system at one concurrency."""

    system: str
    concurrency: int
    token_us: float = 0.0
    """CPU of a streamed token, between answers of 128 and 1,024 tokens."""
    cold_ms: float = 0.0
    """CPU of a request with a prompt never seen."""
    warm_ms: float = 0.0
    """The same where all but the last message was seen."""
    tokens_per_s: float = 0.0
    busy: float = 0.0
    """Share of a core while long answers streamed."""
    problems: list[str] = field(default_factory=list)


class Texts:
    """Chat prompts of about 2,000 tokens under the demo model's tokeniser."""

    def __init__(self, seed: int, tokens: int) -> None:
        import_transformers_without_torch()
        self._tokenizer = Tokenizer.load(str(MODEL))
        self._rng = random.Random(seed)
        ids = [n for n in range(300, self._tokenizer.size) if (self._tokenizer.token(n) or "").startswith("\u0120")]
        self._words = [self._tokenizer.decode([n]).strip() for n in ids]
        self._tokens = tokens
        self.common = self._text(tokens)
        """What warm prompts begin with."""

    def _text(self, tokens: int) -> str:
        text = " ".join(self._rng.choices(self._words, k=tokens))
        return self._tokenizer.decode(self._tokenizer.encode(text)[:tokens])

    def bodies(self, count: int, output: int, kind: str) -> list[str]:
        """kind: short (a prompt of a few words), cold or warm."""
        made = []
        for _ in range(count):
            messages = [{"role": "user", "content": self._text(12)}]
            if kind != "short":
                start = self.common if kind == "warm" else self._text(self._tokens)
                messages.insert(0, {"role": "system", "content": start})
            body = {"model": "source", "messages": messages, "max_tokens": output, "stream": True, "ignore_eos": True}
            made.append(json.dumps(body))
        return made


def cpu_seconds(server: Server) -> float:
    """Processor time of all of a server's processes."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return sum(each.user + each.system for each in times)


@contextmanager
def source(command: list[str], log: Path) -> Iterator[None]:
    """A process that makes tokens."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def tandem(folder: Path, step_ms: float, options: list[str], hold: bool) -> Iterator[Server]:
    """The router in front of two sources of tokens."""
    port, control, *workers = free_ports(4)
    with ExitStack() as stack:
        for worker in workers:
            command = ["-m", "tandem.testing.token_source", str(worker), str(MODEL), str(step_ms)]
            stack.enter_context(source(command + ["--hold"] * hold, folder / f"source{worker}.log"))
        command = [sys.executable, *options, "-m", "tandem.cli", "router", "--port", str(port)]
        command += ["--control-port", str(control), "--served-model-name", "source"]
        command += ["--max-inflight", "20000", "--max-connections", "16384"]
        for worker in workers:
            command += ["--workers", f"127.0.0.1:{worker}"]
        server = Server("tandem", command, f"http://127.0.0.1:{port}", folder / "tandem.log", ready="/ready")
        stack.enter_context(server.running())
        yield server


@contextmanager
def sglang(folder: Path, step_ms: float, python: Path) -> Iterator[Server]:
    """SGLang's router in front of two HTTP servers."""
    port, metrics, *workers = free_ports(4)
    with ExitStack() as stack:
        for worker in workers:
            command = ["-m", "benchmarks.http_source", str(worker), str(step_ms)]
            stack.enter_context(source(command, folder / f"source{worker}.log"))
        command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--worker-urls", *(f"http://127.0.0.1:{worker}" for worker in workers)]
        command += ["--policy", "cache_aware", "--prometheus-port", str(metrics), "--log-level", "warn"]
        server = Server("sglang", command, f"http://127.0.0.1:{port}", folder / "sglang.log")
        stack.enter_context(server.running())
        yield server


class Load:
    """Runs the client against one server."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self._file = folder / "bodies"
        self.port = int(server.url.rsplit(":", 1)[1])

    def run(self, bodies: list[str], concurrency: int) -> tuple[float, dict[str, Any]]:
        """CPU seconds of the server, and what the client saw."""
        self._file.write_text("\n".join(bodies))
        command = [sys.executable, "-m", "benchmarks.stream_client", str(self.port), str(concurrency), str(self._file)]
        before = cpu_seconds(self._server)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        time.sleep(0.2)  # what is left to do when the last byte is read
        return cpu_seconds(self._server) - before, json.loads(done.stdout)


def measure(server: Server, texts: Texts, folder: Path, concurrencies: tuple[int, ...]) -> list[Cost]:
    """All figures of one system."""
    load, found = Load(server, folder), []
    load.run(texts.bodies(64, SHORT, "short") + texts.bodies(8, 1, "warm"), 16)
    for concurrency in concurrencies:
        cost = Cost(server.name, concurrency)
        count = max(concurrency, 32)
        short, first = load.run(texts.bodies(count, SHORT, "short"), concurrency)
        long, second = load.run(texts.bodies(count, LONG, "short"), concurrency)
        cost.token_us = (long - short) / (count * (LONG - SHORT)) * 1e6
        cost.tokens_per_s, cost.busy = second["events"] / second["seconds"], long / second["seconds"]
        cold, third = load.run(texts.bodies(REQUESTS, 1, "cold"), concurrency)
        warm, _ = load.run(texts.bodies(REQUESTS, 1, "warm"), concurrency)
        cost.cold_ms, cost.warm_ms = cold / REQUESTS * 1e3, warm / REQUESTS * 1e3
        for seen, answers, output in ((first, count, SHORT), (second, count, LONG), (third, REQUESTS, 1)):
            cost.problems += seen["problems"]
            if seen["answers"] != answers or seen["events"] < answers * output * EVENTS:
                cost.problems.append(f"{seen['answers']} of {answers} answers, {seen['events']} events")
        found.append(cost)
    return found


def idle(count: int) -> dict[str, float]:
    """Memory of the router with `count` streams that wait, MiB."""
    texts = Texts(1, 8)
    with TemporaryDirectory() as name, tandem(Path(name), 10.0, [], hold=True) as server:
        folder = Path(name)
        load = Load(server, folder)
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        (folder / "bodies").write_text("\n".join(texts.bodies(count, 1000, "short")))
        command = [sys.executable, "-m", "benchmarks.stream_client", str(load.port), "1", str(folder / "bodies")]
        client = subprocess.Popen(
            [*command, "--open"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        if client.stdout.readline() != "open\n":
            raise SystemExit("the streams did not open")
        held = process.memory_info().rss
        started = cpu_seconds(server)
        time.sleep(5)
        spent = (cpu_seconds(server) - started) / 5
        client.communicate()
        return {"streams": count, "before": before / (1 << 20), "with": held / (1 << 20), "idle_cores": spent}


def show(costs: list[Cost]) -> None:
    table = Table(title="the router's CPU")
    for title in ("", "concurrency", "µs a token", "ms a request, cold", "ms a request, warm", "tokens/s", "busy"):
        table.add_column(title, justify="right")
    for cost in costs:
        figures = (f"{cost.token_us:.1f}", f"{cost.cold_ms:.2f}", f"{cost.warm_ms:.2f}", f"{cost.tokens_per_s:.0f}")
        table.add_row(cost.system, str(cost.concurrency), *figures, f"{cost.busy:.0%}")
    console = Console(file=sys.stdout, width=120)
    console.print(table)
    for problem in sorted({problem for cost in costs for problem in cost.problems}):
        console.print(f"problem: {problem}")


@app.command()
def main(
    peer: Annotated[Path | None, typer.Option(help="interpreter that has sglang-router")] = None,
    step_ms: Annotated[float, typer.Option(help="milliseconds between a stream's tokens")] = 10.0,
    tokens: Annotated[int, typer.Option(help="tokens of a prompt")] = 2000,
    concurrency: Annotated[list[int] | None, typer.Option(help="default: 16 and 256")] = None,
    idle_streams: Annotated[int, typer.Option("--idle", help="streams to hold open instead")] = 0,
    profile: Annotated[Path | None, typer.Option(help="file for the router's profile; makes it slower")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Measures, prints a table."""
    if idle_streams:
        sys.stdout.write(json.dumps(idle(idle_streams)) + "\n")
        return
    texts, costs = Texts(1, tokens), []
    concurrencies = tuple(concurrency or CONCURRENCIES)
    with TemporaryDirectory() as name:
        folder = Path(name)
        options = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
        with tandem(folder, step_ms, options, hold=False) as server:
            costs += measure(server, texts, folder, concurrencies)
        if peer is not None:
            with sglang(folder, step_ms, peer) as server:
                costs += measure(server, texts, folder, concurrencies)
    show(costs)
    if out is not None:
        out.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    app()
