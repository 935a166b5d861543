"""The tables of `docs/models.md`, from the registry of families and from the variants that tests compare.

python -m tandem.testing.model_table docs/models.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tandem.engine.model.config import POST_NORMS, PRE_NORMS, SANDWICH_NORMS, ModelConfig
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields
from tandem.engine.model.registry import FAMILIES
from tandem.testing.checkpoints import CheckpointSpec, make_config
from tandem.testing.families import VARIANTS

BEGIN, END = "<!-- generated: make docs -->", "<!-- end of the generated part -->"
NORMS = {PRE_NORMS: "before", POST_NORMS: "after", SANDWICH_NORMS: "before and after"}
QK_NORMS = {"none": "", "heads": "q and k, by head", "whole": "q and k, whole"}


def render() -> str:
    """Both tables, as Markdown."""
    served, compared = [], []
    for families in _modules().values():
        names = [family.architecture for family in families]
        variants = {name: spec for name, spec in VARIANTS.items() if architecture_of(spec) in names}
        configs = [parse(spec) for spec in variants.values()]
        title, _, what = _text(families[0]).partition(": ")
        served.append((title, ", ".join(f"`{name}`" for name in names), what.rstrip("."), *_features(configs)))
        sizes = _join(sorted({config.head_dim for config in configs}))
        groups = _join(sorted({config.num_heads // config.num_kv_heads for config in configs}))
        compared.append((title, ", ".join(f"`{name}`" for name in variants), sizes, groups))
    head = ("family", "architectures", "what is its own", "windows", "rotations", "norms", "caps")
    tested = ("family", "compared variants", "head sizes", "query heads per KV head")
    return f"{_table(head, served)}\n\n{_table(tested, compared)}\n"


def architecture_of(spec: CheckpointSpec) -> str:
    """The name that a made checkpoint carries in its configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[spec.family])


def parse(spec: CheckpointSpec) -> ModelConfig:
    """What the family reads of a spec's configuration."""
    fields = Fields(make_config(spec).to_dict() | {"architectures": [architecture_of(spec)]}, "config.json")
    return FAMILIES[architecture_of(spec)].parse(fields)


def update(path: Path) -> bool:
    """Writes the tables between the marks of a page; whether that changed it. Raises ValueError without marks."""
    old = path.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks {BEGIN} or {END}")
    new = f"{before}{BEGIN}\n\n{render()}\n{END}{after}"
    if new != old:
        path.write_text(new)
    return new != old


def _modules() -> dict[str, list[Family]]:
    """Families by the file they are written in, in the order of the registry."""
    found: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        found.setdefault(family.parse.__module__, []).append(family)
    return found


def _text(family: Family) -> str:
    return (sys.modules[family.parse.__module__].__doc__ or "").partition("\n")[0]


def _features(configs: Sequence[ModelConfig]) -> tuple[str, str, str, str]:
    """Windows, rotations, norms and caps of what was compared."""
    windowed = [[layer.window is not None for layer in config.layers] for config in configs]
    windows = [("every layer", any(all(w) for w in windowed)), ("some layers", any(any(w) > all(w) for w in windowed))]
    kinds = _join(sorted({rope.kind for config in configs for rope in config.ropes}, key=lambda k: (k != "default", k)))
    extras = [
        ("part of a head", any(rope.rotary_dim < c.head_dim for c in configs for rope in c.ropes)),
        ("two bases", any(len(config.ropes) > 1 for config in configs)),
        ("none in some layers", any(layer.rope is None for config in configs for layer in config.layers)),
    ]
    norms = [NORMS[configs[0].block_norms], QK_NORMS[configs[0].qk_norm]]
    caps = [
        ("scores", any(config.attention_softcap for config in configs)),
        ("logits", any(config.logit_softcap for config in configs)),
    ]
    return _chosen(windows), _join([kinds, _chosen(extras)]), _join(norms), _chosen(caps)


def _chosen(options: Iterable[tuple[str, bool]]) -> str:
    return _join(name for name, present in options if present)


def _join(parts: Iterable[object]) -> str:
    return ", ".join(str(part) for part in parts if part)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    update(Path(sys.argv[1]))
