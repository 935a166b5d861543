"""All formats by name, and which one a model's chat template asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from tandem.text.formats.calls import ToolFormat
from tandem.text.formats.deepseek import DeepSeek
from tandem.text.formats.hermes import Hermes
from tandem.text.formats.llama3 import Llama3
from tandem.text.formats.mistral import Mistral
from tandem.text.formats.pythonic import Pythonic
from tandem.text.formats.reasoning import ReasoningFormat

AUTO, NONE = "auto", "none"


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    def fits(self, template: str) -> bool: ...


_F = TypeVar("_F", bound=_Named)


def _by_name(*formats: _F) -> dict[str, _F]:
    return {each.name: each for each in formats}


# The order matters to `auto`: the first that fits is taken.
TOOL_FORMATS: Mapping[str, ToolFormat] = _by_name(DeepSeek(), Mistral(), Hermes(), Llama3(), Pythonic())
REASONING_FORMATS: Mapping[str, ReasoningFormat] = _by_name(
    ReasoningFormat("think", "<think>", "</think>"),  # DeepSeek R1, Qwen 3, QwQ
    ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
)
TOOL_PARSERS = (AUTO, NONE, *TOOL_FORMATS)
REASONING_PARSERS = (AUTO, NONE, *REASONING_FORMATS)


def choose(formats: Mapping[str, _F], wanted: str, template: str) -> _F | None:
    """The format named `wanted`; for auto, the one that fits the chat template; None for none, or when none fits."""
    if wanted == AUTO:
        return next((each for each in formats.values() if each.fits(template)), None)
    return None if wanted == NONE else formats[wanted]
