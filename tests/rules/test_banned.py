"""Constructs that are nowhere used, or in one place only."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
RECEIVERS = {"recv_pyobj", "send_pyobj", "load_module", "trust_remote_code"}
"""Names of methods and keywords that unpickle or run what they are given, whoever has them."""
SECRETS = re.compile(r"(api_?key|secret|password|credential|authorization|bearer|metrics_token|cluster_token)$")
SECRET_FILES = ("router/admission/", "tandem/trust.py", "tandem/worker/metrics.py", "kvtransfer/backends/tcp.py")
SECRETS_THERE = re.compile(r"(token|key|digest|shown|given)$")
"""Elsewhere a token is one of the model's."""
CHANNELS = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
PRODUCT = ("tandem/", "router/", "prefill_worker/", "decode_worker/", "kvtransfer/")
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
PRINTERS = ("tandem/cli/", "tandem/demo/train.py", "benchmarks/")
POLLS_FOR_EVER_S = 30

parse = cache(ast.parse)
Rule = Callable[[str, str], list[str]]


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported: `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported or mentioned."""
    yield from _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, _dotted(node)


def unsafe(path: str, text: str) -> list[str]:
    """Code execution by data: pickle and its kin, eval, unsafe loaders."""
    tree = parse(text)
    found = {(line, name) for line, name in _imported(tree) if name.split(".")[0] in MODULES or name in CALLS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in RECEIVERS:
            found.add((node.lineno, node.attr))
        if isinstance(node, ast.Call):
            if _dotted(node.func) in CALLS:
                found.add((node.lineno, _dotted(node.func)))
            for keyword in node.keywords:
                if keyword.arg in RECEIVERS and getattr(keyword.value, "value", True) is not False:
                    found.add((node.lineno, str(keyword.arg)))
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False:
                    found.add((node.lineno, "allow_pickle"))
    return [f"{path}:{line}: {name}" for line, name in sorted(found)]


def environment(path: str, text: str) -> list[str]:
    """Reads or writes of the environment outside the settings."""
    if path == "tandem/config/environment.py":
        return []
    found = {(line, name) for line, name in _uses(parse(text)) if name in ENVIRONMENT}
    return [f"{path}:{line}: {name}; only tandem/config/environment.py may" for line, name in sorted(found)]


def accelerator(path: str, text: str) -> list[str]:
    """Device programming interfaces outside the one file that knows them."""
    if path == "tandem/device.py":
        return []
    found = {(line, "torch.cuda") for line, name in _uses(parse(text)) if f"{name}.".startswith("torch.cuda.")}
    return [f"{path}:{line}: {name}; only tandem/device.py may" for line, name in sorted(found)]


def bare_except(path: str, text: str) -> list[str]:
    """`except:` catches even the interpreter's exit."""
    nodes = (n for n in ast.walk(parse(text)) if isinstance(n, ast.ExceptHandler) and n.type is None)
    return [f"{path}:{node.lineno}: bare except" for node in nodes]


def prints(path: str, text: str) -> list[str]:
    """Servers log; only programs with a terminal print."""
    if path.startswith(PRINTERS):
        return []
    nodes = (n for n in ast.walk(parse(text)) if isinstance(n, ast.Call) and _dotted(n.func) == "print")
    return [f"{path}:{node.lineno}: print" for node in nodes]


def global_state(path: str, text: str) -> list[str]:
    """`global` is the mark of a singleton."""
    nodes = (n for n in ast.walk(parse(text)) if isinstance(n, ast.Global))
    return [f"{path}:{node.lineno}: global" for node in nodes]


def unfinished(path: str, text: str) -> list[str]:
    """Open ends belong to the tracker."""
    return [f"{path}:{n}: unfinished" for n, line in enumerate(text.splitlines(), 1) if UNFINISHED.search(line)]


def sleeps(path: str, text: str) -> list[str]:
    """In tests, a wait of fixed length outside a polling loop is a guess at how fast the machine is."""
    if not path.startswith("tests/"):
        return []
    tree = parse(text)
    loops = (node for node in ast.walk(tree) if isinstance(node, ast.While | ast.For | ast.AsyncFor))
    polling = {id(node) for loop in loops for node in ast.walk(loop)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in {"time.sleep", "asyncio.sleep", "sleep"} and node.args:
            length = node.args[0].value if isinstance(node.args[0], ast.Constant) else 1
            for_ever = isinstance(length, int | float) and (length == 0 or length >= POLLS_FOR_EVER_S)
            if id(node) not in polling and not for_ever:
                found.append(f"{path}:{node.lineno}: waits for a time instead of an event")
    return found


def compared_secrets(path: str, text: str) -> list[str]:
    """`==` ends at the first difference, and how long it took tells how much was right (CVE-2025-59425)."""
    if not path.startswith(PRODUCT):
        return []
    names = re.compile(f"{SECRETS.pattern}|{SECRETS_THERE.pattern}") if path.startswith(SECRET_FILES) else SECRETS
    found = []
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Compare) and any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops):
            said = [_dotted(side) for side in (node.left, *node.comparators) if not isinstance(side, ast.Constant)]
            found += [f"{path}:{node.lineno}: {name} is compared" for name in said if names.search(name)]
    return found


def open_channels(path: str, text: str) -> list[str]:
    """Ports and connections of gRPC that no token or certificate guards."""
    if path == "tandem/trust.py" or not path.startswith(PRODUCT) or path.startswith("tandem/testing/"):
        return []
    nodes = [node for node in ast.walk(parse(text)) if isinstance(node, ast.Attribute)]
    found = {(n.lineno, _dotted(n)) for n in nodes if n.attr in CHANNELS or _dotted(n).endswith("grpc.aio.server")}
    return [f"{path}:{line}: {name}; only tandem/trust.py may" for line, name in sorted(found)]


RULES: tuple[Rule, ...] = (
    unsafe,
    compared_secrets,
    open_channels,
    environment,
    accelerator,
    bare_except,
    prints,
    global_state,
    unfinished,
    sleeps,
)

PLANTED: tuple[tuple[Rule, str, str], ...] = (
    (unsafe, "router/a.py", "import dill"),
    (unsafe, "router/a.py", "socket.recv_pyobj()"),
    (unsafe, "router/a.py", "self.out.send_pyobj(x)"),
    (unsafe, "tandem/a.py", "AutoTokenizer.from_pretrained(path, trust_remote_code=True)"),
    (compared_secrets, "router/a.py", "ok = given == config.api_key"),
    (compared_secrets, "tandem/a.py", "if header != secret:\n    pass"),
    (compared_secrets, "router/admission/a.py", "ok = self._token == token"),
    (compared_secrets, "kvtransfer/backends/tcp.py", "ok = bytes(token) == self._token"),
    (open_channels, "router/a.py", "channel = grpc.aio.insecure_channel(address)"),
    (open_channels, "tandem/worker/a.py", "server = grpc.aio.server()"),
    (open_channels, "tandem/worker/a.py", "server.add_insecure_port(address)"),
    (unsafe, "router/a.py", "import pickle"),
    (unsafe, "router/a.py", "from cloudpickle import dumps"),
    (unsafe, "router/a.py", "def f():\n    import marshal"),
    (unsafe, "router/a.py", "eval('1')"),
    (unsafe, "router/a.py", "exec('1')"),
    (unsafe, "router/a.py", "import torch\ntorch.load('x')"),
    (unsafe, "router/a.py", "from torch import load"),
    (unsafe, "router/a.py", "import yaml\nyaml.load('x', Loader=yaml.Loader)"),
    (unsafe, "router/a.py", "import yaml\nyaml.unsafe_load('x')"),
    (unsafe, "router/a.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (environment, "router/a.py", "import os\nos.environ['A']"),
    (environment, "router/a.py", "import os\nos.getenv('A')"),
    (environment, "tests/a.py", "from os import environ"),
    (accelerator, "tandem/engine/a.py", "import torch\ntorch.cuda.synchronize()"),
    (accelerator, "tandem/engine/a.py", "import torch.cuda"),
    (accelerator, "tandem/engine/a.py", "from torch import cuda"),
    (accelerator, "tandem/engine/a.py", "from torch.cuda import Stream"),
    (bare_except, "router/a.py", "try:\n    f()\nexcept:\n    pass"),
    (prints, "router/a.py", "print('x')"),
    (prints, "tandem/demo/about.py", "print('x')"),
    (global_state, "router/a.py", "def f():\n    global x\n    x = 1"),
    (unfinished, "router/a.py", "x = 1  # TO" + "DO: two"),
    (sleeps, "tests/a.py", "import time\ndef test_a():\n    time.sleep(0.1)"),
    (sleeps, "tests/a.py", "import asyncio\nasync def test_a():\n    await asyncio.sleep(DELAY)"),
)

ALLOWED: tuple[tuple[Rule, str, str], ...] = (
    (unsafe, "tandem/a.py", "AutoTokenizer.from_pretrained(path, trust_remote_code=False)"),
    (compared_secrets, "tandem/engine/a.py", "ok = token == eos"),
    (compared_secrets, "router/admission/a.py", "ok = hmac.compare_digest(token, self._token)"),
    (open_channels, "tandem/trust.py", "channel = grpc.aio.insecure_channel(address)"),
    (open_channels, "tests/a.py", "server = grpc.aio.server()"),
    (
        unsafe,
        "router/a.py",
        "model.eval()\nimport yaml\nyaml.safe_load('x')\nimport numpy\nnumpy.load('x', allow_pickle=False)",
    ),
    (environment, "tandem/config/environment.py", "import os\nos.environ['A']"),
    (environment, "router/a.py", "import os\nos.getpid()"),
    (accelerator, "tandem/device.py", "import torch\ntorch.cuda.synchronize()"),
    (accelerator, "tandem/engine/a.py", "import torch\ntorch.float32"),
    (bare_except, "router/a.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (prints, "tandem/cli/up.py", "print('x')"),
    (prints, "router/a.py", "console.print('x')"),
    (
        sleeps,
        "tests/a.py",
        "import asyncio\nasync def test_a():\n    while not done():\n        await asyncio.sleep(0.01)",
    ),
    (sleeps, "tests/a.py", "import asyncio\nasync def test_a():\n    await asyncio.sleep(0)"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule: Rule, sources: dict[str, str]) -> None:
    assert [line for path, text in sources.items() for line in rule(path, text)] == []


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_caught(rule: Rule, path: str, text: str) -> None:
    assert len(rule(path, text)) >= 1


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) == []


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_the_settings_do_read_the_environment(sources: dict[str, str]) -> None:
    uses = {name for _, name in _uses(parse(sources["tandem/config/environment.py"]))}
    assert uses & ENVIRONMENT
