"""Every public module, class and function says what it does."""

from __future__ import annotations

import ast

import pytest

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(path: str, text: str) -> list[str]:
    tree = ast.parse(text)
    found = [] if ast.get_docstring(tree) else [f"{path}: module"]
    return found + _undocumented_in(path, tree.body)


def _undocumented_in(path: str, body: list[ast.stmt]) -> list[str]:
    found = []
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            found += _undocumented_in(path, node.body)
        if isinstance(node, Documented) and not node.name.startswith("_") and not _repeats(node):
            if not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno}: {node.name}")
            if isinstance(node, ast.ClassDef):
                found += _undocumented_in(path, node.body)
    return found


def _repeats(node: Documented) -> bool:
    """An overload or a setter: its documentation stands at the first definition."""
    text = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return "overload" in text or ".setter" in text


def test_everything_public_is_documented(product: dict[str, str]) -> None:
    assert [line for path, text in product.items() for line in undocumented(path, text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", ["a.py: module"]),
        ('"""M."""\nclass A:\n    pass', ["a.py:2: A"]),
        ('"""M."""\nclass A:\n    """A."""\n    def f(self): ...', ["a.py:4: f"]),
        ('"""M."""\nasync def f(): ...', ["a.py:2: f"]),
        ('"""M."""\nif x:\n    def f(): ...', ["a.py:3: f"]),
        ('"""M."""\ndef _f(): ...\nclass _A:\n    def f(self): ...', []),
        ('"""M."""\ndef f():\n    """F."""\n    def g(): ...', []),
        ('"""M."""\n@overload\ndef f(): ...', []),
    ],
)
def test_what_lacks_a_docstring_is_caught(text: str, found: list[str]) -> None:
    assert undocumented("a.py", text) == found
