"""One JSON schema document: where its references lead, and how complaints name a place in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]

HOLD_SCHEMA = frozenset(
    {
        "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then", "unevaluatedItems",
        "unevaluatedProperties",
    }
)  # fmt: skip
HOLD_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
HOLD_TABLE = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})


class Unfit(ValueError):
    """A schema that cannot be held to."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path or '#'}: {why}")


class Document:
    """The schema with everything that a `$ref` may lead to."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._anchors: dict[str, str] = {}
        self._foreign = False
        """Whether some part has an id of its own, from which references are resolved otherwise."""
        for path, schema in _schemas(root):
            for name in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := schema.get(name), str):
                    self._foreign |= anchor in self._anchors
                    self._anchors[anchor] = path
            self._foreign |= bool(path) and "$id" in schema
        self._id = str(root.get("$id", "")).rstrip("#") if isinstance(root, dict) else ""

    def target(self, reference: Any, path: str) -> str:
        """The path, as in `#/$defs/a`, that a reference leads to. Raises Unfit where it leads out of the document."""
        if not isinstance(reference, str):
            raise Unfit(path, "$ref must be a string")
        base, _, fragment = reference.partition("#")
        if self._foreign or (base and base != self._id):
            raise Unfit(
                path, f"$ref to {reference[:80]!r} is not supported: only references within a schema without $id"
            )
        if fragment and not fragment.startswith("/"):
            if fragment not in self._anchors:
                raise Unfit(path, f"$ref to {reference[:80]!r} leads nowhere")
            return self._anchors[fragment]
        self.at(unquote(fragment), path)
        return unquote(fragment)

    def at(self, pointer: str, path: str) -> Any:
        """What a JSON pointer leads to (RFC 6901). Raises Unfit where it leads nowhere."""
        found = self.root
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise Unfit(path, f"$ref to '#{pointer[:80]}' leads nowhere") from None
        return found


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _schemas(root: Any) -> Iterator[tuple[str, Schema]]:
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        path, schema = todo.pop()
        if not isinstance(schema, dict):
            continue
        yield path, schema
        for name, value in schema.items():
            if name in HOLD_SCHEMA and isinstance(value, dict):
                todo.append((f"{path}/{name}", value))
            elif name in HOLD_LIST and isinstance(value, list):
                todo += [(f"{path}/{name}/{index}", each) for index, each in enumerate(value)]
            elif name in HOLD_TABLE and isinstance(value, dict):
                todo += [(f"{path}/{name}/{escaped(key)}", each) for key, each in value.items()]
