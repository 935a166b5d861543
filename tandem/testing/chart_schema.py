"""Writes what of the chart is generated: its schema of values, its table of options, and copies of what it ships.

python -m tandem.testing.chart_schema [ROOT]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.config import DecodeConfig, PrefillConfig, ProcessConfig, RouterConfig, WorkerConfig
from tandem.testing.chart_values import PodValues, Pool, TandemValues, Values

CHART = Path("helm/tandem")
DOCS = Path("docs/kubernetes.md")
BEGIN, END = "<!-- generated: make helm-files -->", "<!-- end of the generated part -->"
COPIES = {"dashboards": "deploy/grafana/dashboards/*.json", "rules": "deploy/prometheus/rules/*.yaml"}
"""Folder under the chart's `files/` -> what is copied there: a chart cannot read outside its own folder."""

OWNED = frozenset(
    {
        *("config", "token", "metrics_token", "tls_cert", "tls_key", "tls_ca", "tls_name"),
        *("model", "served_model_name", "cluster_key", "host", "port"),
        *("control_host", "control_port", "api_keys", "workers", "workers_file"),
        *("kubernetes_namespace", "kubernetes_selector"),
        *("metrics_port", "router", "compute_slots"),
    }
)
"""Settings that the chart's own values decide, or that mean nothing in a pod."""
EOF = "\n"

Schema = dict[str, Any]


def settings_schema(config: type[ProcessConfig]) -> Schema:
    """The settings of a process that a chart's user may give, as a JSON schema. None is said by leaving one out."""
    whole = config.model_json_schema()
    fields = {name: plain(field) for name, field in whole["properties"].items() if name not in OWNED}
    return {
        "type": "object",
        "description": f"settings of {(config.__doc__ or '').strip()}",
        "additionalProperties": False,
        "properties": fields,
    }


def plain(schema: Schema) -> Schema:
    """Without titles, and without null as an alternative: errors are then said of the one type that is meant."""
    kept = {key: value for key, value in schema.items() if key not in ("title", "anyOf", "default", "format")}
    alternatives = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(alternatives) == 1:
        kept = {**plain(alternatives[0]), **kept}
    elif alternatives:
        kept["anyOf"] = [plain(each) for each in alternatives]
    if isinstance(kept.get("items"), dict):
        kept["items"] = plain(kept["items"])
    if schema.get("default") is not None and not isinstance(schema["default"], dict | list):
        kept["default"] = schema["default"]
    return kept


def values_schema() -> Schema:
    """The schema of the chart's values: its own from `TandemValues`, the processes' from `tandem.config`."""
    whole = TandemValues.model_json_schema()
    definitions = {name: _object(schema) for name, schema in whole.pop("$defs").items()}
    definitions["RouterSettings"] = settings_schema(RouterConfig)
    definitions["WorkerSettings"] = settings_schema(WorkerConfig)
    definitions["PrefillSettings"] = settings_schema(PrefillConfig)
    definitions["DecodeSettings"] = settings_schema(DecodeConfig)
    definitions["Router"]["properties"]["settings"] = _of("RouterSettings")
    definitions["Workers"]["properties"]["settings"] = _of("WorkerSettings")
    definitions["Pool"] |= {
        "if": {"properties": {"role": {"const": "prefill"}}},
        "then": {"properties": {"settings": _of("PrefillSettings")}},
        "else": {"properties": {"settings": _of("DecodeSettings")}},
    }
    top = _object(whole)
    top["properties"]["global"] = {"type": "object", "description": "Helm's own, for charts that have this one inside"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of tandem", **top} | {
        "$defs": definitions
    }


def _of(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(schema: Schema) -> Schema:
    """A model's schema. Nothing but a pool's name and role is required: Helm fills in the rest from values.yaml."""
    required = [
        name for name in schema.get("required", ()) if name in ("name", "role") and "role" in schema["required"]
    ]
    kept = {key: value for key, value in schema.items() if key not in ("title", "required", "properties")}
    kept["properties"] = {name: plain(field) for name, field in schema["properties"].items()}
    return kept | ({"required": required} if required else {})


def options_table() -> str:
    """Every option of a pool, and of the routers where they have it too, as a Markdown table."""
    lines = ["| option | type | what |", "|---|---|---|"]
    shared = set(PodValues.model_fields)
    properties = Pool.model_json_schema()["properties"]
    for name, field in Pool.model_fields.items():
        alias = field.alias or name
        mark = "" if name not in shared else " ¹"
        lines.append(f"| `{alias}`{mark} | {_type(plain(properties[alias]))} | {field.description} |")
        nested = _model(field.annotation)
        if nested is None:
            continue
        inner = nested.model_json_schema()["properties"]
        for part, inside in nested.model_fields.items():
            key = inside.alias or part
            lines.append(
                f"| `{alias}.{key}` | {_type(plain(inner[key]))} | {inside.description}{_default(inner[key])} |"
            )
    return EOF.join(lines) + EOF


def _model(annotation: Any) -> type[Values] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Values):
            return candidate
    return None


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    return {"object": "map", "array": "list"}.get(schema.get("type", "object"), str(schema.get("type", "map")))


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default in (None, "") or isinstance(default, dict) else f" (default: {json.dumps(default)})"


def generated(root: Path) -> dict[Path, str]:
    """Path from the root -> what has to be there."""
    made = {CHART / "values.schema.json": json.dumps(values_schema(), indent=1, ensure_ascii=False) + EOF}
    for folder, pattern in COPIES.items():
        for file in sorted(root.glob(pattern)):
            made[CHART / "files" / folder / file.name] = file.read_text()
    if (root / DOCS).is_file():
        made[DOCS] = between_marks((root / DOCS).read_text(), options_table())
    return made


def between_marks(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises ValueError without marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCS} lacks {BEGIN} or {END}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def stale(root: Path) -> list[str]:
    """What differs from what would be generated, and copies of what is no longer there."""
    made = generated(root)
    differing = [
        path for path, text in made.items() if not (root / path).is_file() or (root / path).read_text() != text
    ]
    copies = (file for folder in COPIES for file in (root / CHART / "files" / folder).glob("*.*"))
    left = [path for path in (file.relative_to(root) for file in copies) if path not in made]
    return sorted(str(path) for path in (*differing, *left))


def write(root: Path) -> None:
    """Brings everything that is generated up to date."""
    made = generated(root)
    for path in map(Path, stale(root)):
        if path in made:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(made[path])
        else:
            (root / path).unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
