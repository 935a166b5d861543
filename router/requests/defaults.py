"""What a checkpoint's author recommends for sampling, in `generation_config.json`: used where a client says nothing.

As in vLLM and SGLang, `do_sample` is not looked at: a client that wants the likeliest token says `temperature: 0`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from tandem.types import SamplingParams

log = logging.getLogger(__name__)

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults that differ from Tandem's own; None says nothing. Ranges are those of `SamplingParams`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    """Output tokens of a chat whose client sets no limit."""


def read_defaults(folder: Path) -> GenerationDefaults:
    """The defaults of the checkpoint in `folder`; none when it has no such file. What is out of range is logged."""
    path = folder / FILE
    if not path.is_file():
        return GenerationDefaults()
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        log.error("%s cannot be read as JSON, its defaults are not used: %s", path, error)
        return GenerationDefaults()
    kept: dict[str, float] = {}
    for name in GenerationDefaults.__dataclass_fields__:
        value = found.get(name) if isinstance(found, dict) else None
        if value is None:
            continue
        if problem := _problem(name, value):
            log.error("%s: %s; Tandem's own default is used instead", path, problem)
        else:
            kept[name] = value
    defaults = GenerationDefaults(**kept)  # type: ignore[arg-type]
    if kept:
        log.info("defaults of the model's %s: %s", FILE, kept)
    return defaults


def _problem(name: str, value: object) -> str:
    """Why a value cannot be a default, or an empty string."""
    kinds = (int,) if name in ("top_k", "max_new_tokens") else (int, float)
    if type(value) not in kinds:
        return f"{name} is {value!r:.40}; it must be a number"
    if name == "max_new_tokens":
        return "" if 1 <= value <= 1 << 31 else f"{name} is {value}; it must be at least 1"  # type: ignore[operator]
    try:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""
