"""The schema of numbers."""

from __future__ import annotations

import math

from tandem.engine.grammar.schema.document import Schema, Unfit
from tandem.engine.grammar.schema.merge import OF_TYPE, Flat

MAX_FACTOR = 1024
"""Largest `multipleOf` that XGrammar keeps for any number."""
MAX_RANGE = 9999
"""Widest range in which it looks for multiples."""


def number_schema(flat: Flat, path: str) -> Schema | None:
    """The schema of numbers for merged keywords; None when there is no such number. Raises Unfit."""
    made: Schema = {name: flat[name] for name in OF_TYPE["number"] & flat.keys()}
    factor = made.pop("multipleOf", None)
    if factor is not None and (not float(factor).is_integer() or not 0 < factor <= MAX_FACTOR):
        raise Unfit(path, f"multipleOf {factor} is not supported: only whole numbers of 1 to {MAX_FACTOR}")
    if flat.get("integer") or factor is not None:
        return _whole(made, 1 if factor is None else int(factor), path)
    low = max(made.get("minimum", -math.inf), made.get("exclusiveMinimum", -math.inf))
    high = min(made.get("maximum", math.inf), made.get("exclusiveMaximum", math.inf))
    ends = (made.get("exclusiveMinimum"), made.get("exclusiveMaximum"))
    return None if low > high or (low == high and low in ends) else {"type": "number", **made}


def _whole(said: Schema, factor: int, path: str) -> Schema | None:
    bounds: dict[str, int] = {}
    if "minimum" in said:
        bounds["minimum"] = math.ceil(said["minimum"])
    if "exclusiveMinimum" in said:
        above = math.floor(said["exclusiveMinimum"]) + 1
        bounds["minimum"] = max(bounds.get("minimum", above), above)
    if "maximum" in said:
        bounds["maximum"] = math.floor(said["maximum"])
    if "exclusiveMaximum" in said:
        below = math.ceil(said["exclusiveMaximum"]) - 1
        bounds["maximum"] = min(bounds.get("maximum", below), below)
    if len(bounds) == 2 and bounds["maximum"] // factor * factor < bounds["minimum"]:
        return None
    if factor == 1:
        return {"type": "integer", **bounds}
    if len(bounds) == 1 or (bounds and bounds["maximum"] - bounds["minimum"] > MAX_RANGE):
        why = "multipleOf beside one of minimum and maximum alone, or beside a range of more than"
        raise Unfit(path, f"{why} {MAX_RANGE} numbers, is not supported")
    return {"type": "integer", **bounds, "multipleOf": factor}


def number_fits(flat: Flat, value: float) -> bool:
    """Whether a number that the schema names fits the keywords beside it."""
    if flat.get("integer") and not float(value).is_integer():
        return False
    if "multipleOf" in flat and not float(value / flat["multipleOf"]).is_integer():
        return False
    low, above = flat.get("minimum", -math.inf), flat.get("exclusiveMinimum", -math.inf)
    high, below = flat.get("maximum", math.inf), flat.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)
