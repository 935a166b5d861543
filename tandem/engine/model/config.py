"""A checkpoint's `config.json`, read and checked once. Transformers 5 and older spell it differently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields after `theta` matter only to the kinds that use them (see `rope.py`)."""

    kind: str
    theta: float
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


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    dtype: str
    """What the file names, such as bfloat16; empty when it names none."""
    eos_token_ids: tuple[int, ...]

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for; as in transformers, `max_position_embeddings` includes scaling."""
        return self.max_positions

    @property
    def context_limit(self) -> int:
        """Tokens that a setting may raise `max_context` to: further only where the rotary scaling reaches further."""
        if self.rope.kind in ("yarn", "llama3"):
            return max(self.max_positions, int(self.rope.factor * self.rope.original_positions))
        return int(self.rope.factor * self.max_positions) if self.rope.kind == "dynamic" else self.max_positions


class Fields:
    """Typed access to one JSON object of a checkpoint; raises CheckpointError naming file, field and what is wrong."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Parses a JSON file that holds one object."""
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds a {type(raw).__name__}; an object is needed")
        return cls(raw, str(path))

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """An integer of at least `low`; required when there is no default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._wrong(name, value, f"an integer of at least {low}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """A number greater than `low`, unless it is the default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or (value <= low and value != default):
            raise self._wrong(name, value, f"a number greater than {low:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; empty when the field is missing."""
        value = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise self._wrong(name, value, "a token id or a list of token ids")
        return tuple(ids)

    def nested(self, name: str) -> Fields | None:
        """The object under `name`; None when it is missing."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def unsupported(self, name: str, why: str) -> CheckpointError:
        """The error for a field whose value is valid but not served."""
        return CheckpointError(f"{self.where}: {name} is {self.raw.get(name)!r}: {why}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return default if value is None else value

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {value!r}; {expected} is needed")


def parse_decoder(fields: Fields, architecture: str, qkv_bias: bool, output_bias: bool, mlp_bias: bool) -> ModelConfig:
    """The fields that all families of this shape share; biases are each family's own business."""
    if fields.has("quantization_config"):
        raise CheckpointError(f"{fields.where}: quantization_config is set; quantised checkpoints are not supported")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.unsupported("hidden_act", "only silu is supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.unsupported("num_key_value_heads", f"it must divide num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; rotary embeddings need an even one")
    positions = fields.integer("max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=positions,
        rope=parse_rope(fields, positions),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=fields.text("dtype", fields.text("torch_dtype", "")),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def parse_rope(fields: Fields, positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5, base inside), or `rope_scaling` with `rope_theta` beside it (before)."""
    rope = fields.nested("rope_parameters") or fields.nested("rope_scaling") or Fields({}, fields.where)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"{rope.where}: rope_type is {kind!r}; supported are {', '.join(ROPE_KINDS)}")
    for place in (fields, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.unsupported("partial_rotary_factor", "only whole heads are rotated")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if kind == "default":
        return RopeConfig(kind, theta)
    original = rope.integer("original_max_position_embeddings", positions)
    if fields.has("original_max_position_embeddings"):
        original = fields.integer("original_max_position_embeddings")
    needs_factor = None if kind != "yarn" else positions / original
    factor = rope.number("factor", needs_factor)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            rope.number(name)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_positions=original,
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        truncate=rope.flag("truncate", True),
    )
