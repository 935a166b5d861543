"""Whether a schema that refers to itself has values that end."""

from __future__ import annotations

from typing import Any

from tandem.engine.grammar.schema.document import Schema, Unfit


def check_finite(lowered: Schema) -> None:
    """Raises Unfit for a lowered schema whose every value would hold another one without end."""
    definitions = lowered.get("$defs", {})
    ends: set[str] = set()
    while True:
        more = {name for name, each in definitions.items() if name not in ends and _ends(each, ends)}
        if not more:
            break
        ends |= more
    if not _ends(lowered, ends):
        raise Unfit("", "no finite value can satisfy it: each would have to hold another one")


def _ends(schema: Any, ends: set[str]) -> bool:
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2] in ends
    if "anyOf" in schema:
        return any(_ends(each, ends) for each in schema["anyOf"])
    match schema.get("type"):
        case "object":
            needed = [schema["properties"][name] for name in schema["required"]]
            more = schema.get("minProperties", 0) > len(needed)
            return all(_ends(each, ends) for each in needed) and (not more or _may_hold_more(schema, ends))
        case "array":
            least, firsts = schema.get("minItems", 0), schema.get("prefixItems", [])
            needed = firsts[:least] + ([schema["items"]] if least > len(firsts) else [])
            return all(_ends(each, ends) for each in needed)
    return True


def _may_hold_more(schema: Schema, ends: set[str]) -> bool:
    others = [each for name, each in schema["properties"].items() if name not in schema["required"]]
    others += [*schema.get("patternProperties", {}).values(), schema["additionalProperties"]]
    return any(_ends(each, ends) for each in others if each is not False)
