"""A checkpoint's tokeniser as transformers loads it, and its chat template from wherever it lies.

What has no `tokenizer.json` is converted by transformers, which needs the package `sentencepiece` for sentencepiece's
`.model` files and `tiktoken` for tiktoken's; `pip install tandem-serve[convert]` brings both.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointError

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""A token's bytes in base64, and its rank."""
_CONVERTED = ("tokenizer.json", "tekken.json")
"""Files that need no package to be read."""


def load_wrapped(path: str, chat_template: Path | None = None) -> Any:
    """The tokeniser of a folder or a hub id. Raises CheckpointError when there is none that can be served.

    chat_template: a file with the template to use; None takes the checkpoint's: `chat_template.jinja`, the one or
    several of `tokenizer_config.json`, or `chat_template.json`, in this order.
    """
    from transformers import AutoTokenizer

    if missing := _missing_package(Path(path)):
        raise CheckpointError(f"cannot load a tokenizer from {path!r}: {missing}")
    try:
        wrapped = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"cannot load a tokenizer from {path!r}: {one_line(error)}") from error
    if not getattr(wrapped, "is_fast", False):
        raise CheckpointError(
            f"the tokenizer of {path!r} is a {type(wrapped).__name__}, which is written in Python; only those of the "
            "tokenizers library are served"
        )
    if chat_template is not None:
        wrapped.chat_template = _read(chat_template)
    elif not wrapped.chat_template:
        wrapped.chat_template = _processor_template(Path(path))
    return wrapped


def one_line(error: BaseException) -> str:
    """An error's first line, of bounded length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template {file} cannot be read: {one_line(error)}") from error


def _processor_template(folder: Path) -> Any:
    """The template of checkpoints whose processor, not their tokeniser, has it."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(_read(file))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} must be an object with the key chat_template: {one_line(error)}") from error
    return {each["name"]: each["template"] for each in found} if isinstance(found, list) else found


def _missing_package(folder: Path) -> str:
    """Which package a conversion would need that is not installed, as a sentence; empty if none."""
    if any((folder / name).is_file() for name in _CONVERTED):
        return ""
    for file in sorted(folder.glob("*.model")):
        with file.open("rb") as lines:
            package = "tiktoken" if _TIKTOKEN_LINE.fullmatch(lines.readline(1 << 16)) else "sentencepiece"
        if find_spec(package) is None:
            return (
                f"it has no tokenizer.json, and converting {file.name} needs the package {package}, which is not "
                "installed; pip install tandem-serve[convert]"
            )
    return ""
