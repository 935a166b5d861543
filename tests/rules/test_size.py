"""Files, functions and packages stay small, and no file is a drawer for anything."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import PurePosixPath

FILE_LINES = 600
FUNCTION_LINES = 50
BUDGETS = {
    "router/": 6100,
    "router/admission/": 600,
    "router/discovery/": 600,
    "router/explain/": 600,
    "router/monitoring/": 400,
    "router/replication/": 400,
    "router/simulation/": 1200,
    "router/tracing/": 300,
    "kvtransfer/": 2100,
    "tandem/engine/": 8000,
}
"""Code lines. The longest folder that holds a file is the one that counts it."""
DRAWERS = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}


def long_file(path: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    return [f"{path}: {lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []


def long_functions(path: str, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return found


def drawer(path: str) -> list[str]:
    return [f"{path}: name it for what it holds"] if PurePosixPath(path).name in DRAWERS else []


def code_lines(text: str) -> int:
    """Lines that do something: blank ones, comments and docstrings are free, or they would be the first to go."""
    lines: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        layout = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if not layout and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        before = token.type
    return len(lines)


def over_budget(sources: dict[str, str]) -> list[str]:
    found = []
    for package, budget in BUDGETS.items():
        inner = tuple(other for other in BUDGETS if other.startswith(package) and other != package)
        held = [path for path in sources if path.startswith(package) and not path.startswith(inner)]
        lines = sum(code_lines(sources[path]) for path in held)
        if lines > budget:
            found.append(f"{package}: {lines} lines, at most {budget}")
    return found


def test_files_are_short(sources: dict[str, str]) -> None:
    assert [line for path, text in sources.items() for line in long_file(path, text)] == []


def test_functions_are_short(sources: dict[str, str]) -> None:
    assert [line for path, text in sources.items() for line in long_functions(path, text)] == []


def test_no_file_is_a_drawer(sources: dict[str, str]) -> None:
    assert [line for path in sources for line in drawer(path)] == []


def test_packages_keep_their_budgets(sources: dict[str, str]) -> None:
    assert over_budget(sources) == []


def test_a_long_file_is_caught() -> None:
    assert long_file("a.py", "x = 1\n" * FILE_LINES) == []
    assert long_file("a.py", "x = 1\n" * (FILE_LINES + 1)) == ["a.py: 601 lines, at most 600"]


def test_a_long_function_is_caught() -> None:
    body = "    x = 1\n"
    assert long_functions("a.py", "def f():\n" + body * 49) == []
    assert long_functions("a.py", "def f():\n" + body * 50) == ["a.py:1: f has 51 lines, at most 50"]
    method = "class A:\n    async def f(self):\n" + "        x = 1\n" * 50
    assert long_functions("a.py", method) == ["a.py:2: f has 51 lines, at most 50"]


def test_a_drawer_is_caught() -> None:
    assert drawer("router/utils.py") == ["router/utils.py: name it for what it holds"]
    assert drawer("router/workers/fleet.py") == []


def test_an_overrun_budget_is_caught() -> None:
    assert over_budget({"kvtransfer/a.py": "x\n" * 2099, "kvtransfer/b.py": "x\n"}) == []
    assert (
        code_lines('"""Doc\nstring."""\n\nx = """a\nb"""  # why\n# why\n\n\ndef f():\n    """Doc."""\n    return 1\n')
        == 4
    )
    sources = {"kvtransfer/a.py": "x\n" * 2099, "kvtransfer/b.py": "x\n" * 2}
    assert over_budget(sources) == ["kvtransfer/: 2101 lines, at most 2100"]


def test_a_room_with_a_budget_of_its_own_is_counted_apart() -> None:
    assert over_budget({"router/simulation/a.py": "x\n" * 1201}) == ["router/simulation/: 1201 lines, at most 1200"]
    assert over_budget({"router/simulation/a.py": "x\n" * 1200, "router/a.py": "x\n" * 6100}) == []
