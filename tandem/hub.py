"""Where the model that a setting names lies: a folder, the shipped demo, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import tandem.demo
from tandem.errors import ConfigError

DEMO = "demo"
DEMO_NAME = "tandem-demo"
CONFIGURATION = ("*.json", "*.jinja", "*.model", "*.txt")
"""What configuration, tokenizer and chat templates are stored in."""
WEIGHTS = ("*.safetensors",)
ELSEWHERE = ("[!c]*/*", "c[!h]*/*", "ch[!a]*/*", "cha[!t]*/*", "consolidated*")
"""Other formats of the same model: in folders of their own (all but `chat_templates`), or under Mistral's names."""


def resolve_model(model: str, weights: bool = True) -> str:
    """The folder that holds `model`: a folder is used as it is, `demo` is the shipped model, anything else is a hub id.

    A hub id is downloaded into the hub's cache, without weights if not wanted, unless it is there. `HF_HOME`,
    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as in every client of the hub. Call it once for each process,
    before anything else starts. Raises ConfigError when there is no such model, or the hub does not give it.
    """
    if model == DEMO:
        return _demo()
    if not model:
        raise _wrong("model is empty; a folder or a hub id is needed")
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if Path(model).exists():
        raise _wrong(f"model is {model}, which is a file; the folder it lies in is needed")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise _wrong(f"model is {model}; there is no such folder")
    return _from_hub(model, weights)


def resolve_drafter(name: str) -> str:
    """The folder that holds a draft model or draft head, as `resolve_model`; `demo` is the demo model's head."""
    if name == DEMO:
        return str(tandem.demo.HEAD_PATH)
    try:
        return resolve_model(name)
    except ConfigError as error:
        raise ConfigError(f"draft_{error}", param="draft_model") from None


def served_name(model: str) -> str:
    """The name clients use when no other is set: the last part of the folder's path, or of the hub id."""
    return DEMO_NAME if model == DEMO else Path(model).name or Path(model).resolve().name


def _demo() -> str:
    if not tandem.demo.MODEL_PATH.is_dir():
        raise _wrong(f"model is demo, but this installation has no model at {tandem.demo.MODEL_PATH}")
    return str(tandem.demo.MODEL_PATH)


def _from_hub(model: str, weights: bool) -> str:
    from huggingface_hub import snapshot_download

    wanted = [*CONFIGURATION, *(WEIGHTS if weights else ())]
    try:
        return snapshot_download(model, allow_patterns=wanted, ignore_patterns=list(ELSEWHERE))
    except Exception as error:
        raise _wrong(f"model is {model}, which is no folder here, and {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why the hub did not give it, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    match error:
        case HFValidationError():
            return f"not a hub id either: {first}"
        case GatedRepoError():
            return "the hub gives it only to accounts that were granted access; set HF_TOKEN to a token of one"
        case RepositoryNotFoundError():
            return "the hub has no such model, or it is private and HF_TOKEN gives no access"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return f"it is not in the hub's cache, and the hub cannot be reached: {first}"
        case _:
            return f"the hub does not give it: {type(error).__name__}: {first}"


def _wrong(message: str) -> ConfigError:
    return ConfigError(message, param="model")
