"""What a checkpoint's configuration says of its rotary position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.model.fields import Fields
from tandem.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
UNSUPPORTED = ("llama_4_scaling_beta", "short_mscale", "long_mscale", "mrope_section")
"""Fields that change the computation in ways that no family here has."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields after `theta` matter only to the kinds that use them (see `rope.py`)."""

    kind: str
    theta: float
    rotary_dim: int
    """The first so many elements of a head are rotated."""
    factor: float = 1.0
    original_positions: int = 0
    """Context of the pre-training that a scaling kind extends."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    stretch: tuple[float, ...] = ()
    """LongRoPE's divisors, one for each frequency."""


def parse_rope(fields: Fields, head_dim: int, positions: int, partial: bool = False) -> RopeConfig:
    """`rope_parameters` (transformers 5, base inside), or `rope_scaling` with `rope_theta` beside it (before).

    positions: the model's context. partial: whether the family may rotate only a part of each head.
    """
    rope = fields.nested("rope_parameters") or fields.nested("rope_scaling") or Fields({}, fields.where)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0, low=1.0), low=1.0)
    return rope_of(rope, fields, theta, head_dim, positions, partial)


def rope_of(
    rope: Fields, fields: Fields, theta: float, head_dim: int, positions: int, partial: bool = False
) -> RopeConfig:
    """One object of rotary parameters; `fields` is the configuration around it. Raises CheckpointError for a field."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"{rope.where}: rope_type is {kind!r}; supported are {', '.join(ROPE_KINDS)}")
    for name in UNSUPPORTED:
        if rope.has(name):
            raise rope.unsupported(name, "it is not supported")
    rotary_dim = _rotary_dim((rope, fields), head_dim, partial)
    if kind == "default":
        return RopeConfig(kind, theta, rotary_dim)
    original = rope.integer("original_max_position_embeddings", positions, low=2)
    if fields.has("original_max_position_embeddings"):
        original = fields.integer("original_max_position_embeddings", low=2)
    needs_factor = positions / original if kind in ("yarn", "longrope") else None
    factor = rope.number("factor", needs_factor)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            rope.number(name)
    return RopeConfig(
        kind=kind,
        theta=theta,
        rotary_dim=rotary_dim,
        factor=factor,
        original_positions=original,
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        truncate=rope.flag("truncate", True),
        stretch=_longrope(rope, rotary_dim, positions > original) if kind == "longrope" else (),
    )


def _longrope(rope: Fields, rotary_dim: int, extended: bool) -> tuple[float, ...]:
    """The long divisors for a model whose context is longer than that of its pre-training, else the short ones."""
    short, long = (rope.numbers(name, rotary_dim // 2) for name in ("short_factor", "long_factor"))
    return long if extended else short


def _rotary_dim(places: Sequence[Fields], head_dim: int, partial: bool) -> int:
    for place in places:
        share = place.number("partial_rotary_factor", 1.0)
        if share == 1.0:
            continue
        rotary_dim = int(head_dim * share)
        if not partial:
            raise place.unsupported("partial_rotary_factor", "this family rotates whole heads")
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise place.unsupported("partial_rotary_factor", f"of head_dim {head_dim} it leaves {rotary_dim}")
        return rotary_dim
    return head_dim
