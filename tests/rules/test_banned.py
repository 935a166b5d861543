"""Constructs that are nowhere used, or in one place only."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
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
        if isinstance(node, ast.Call):
            if _dotted(node.func) in CALLS:
                found.add((node.lineno, _dotted(node.func)))
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False:
                    found.add((node.lineno, "allow_pickle"))
    return [f"{path}:{line}: {name}" for line, name in sorted(found)]


def environment(path: str, text: str) -> list[str]:
    """Reads or writes of the environment outside the settings."""
    if path == "tandem/config.py":
        return []
    found = {(line, name) for line, name in _uses(parse(text)) if name in ENVIRONMENT}
    return [f"{path}:{line}: {name}; only tandem/config.py may" for line, name in sorted(found)]


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


RULES: tuple[Rule, ...] = (
    unsafe,
    environment,
    accelerator,
    bare_except,
    prints,
    global_state,
    unfinished,
    sleeps,
)

PLANTED: tuple[tuple[Rule, str, str], ...] = (
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
    (
        unsafe,
        "router/a.py",
        "model.eval()\nimport yaml\nyaml.safe_load('x')\nimport numpy\nnumpy.load('x', allow_pickle=False)",
    ),
    (environment, "tandem/config.py", "import os\nos.environ['A']"),
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
    uses = {name for _, name in _uses(parse(sources["tandem/config.py"]))}
    assert uses & ENVIRONMENT
