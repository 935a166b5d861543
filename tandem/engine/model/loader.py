"""Checkpoints in safetensors form: opened, checked strictly, copied into a model's memory, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem.engine.kernels.choose import Kernels, choose_kernels
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.family import CausalLM, Family
from tandem.engine.model.fields import Fields
from tandem.engine.model.layers import Place, Tensors
from tandem.engine.model.registry import family_of
from tandem.errors import CheckpointError, ConfigError
from tandem.kv import KvLayout
from tandem.types import ModelInfo

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BARE = EMBEDDING.removeprefix("model.")
SAMPLE_BYTES = 256
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors of old checkpoints that repeat what the configuration says."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    name: str
    """In the file; the decoder's own name may be another."""
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    size: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what the cluster must know about it."""

    module: CausalLM
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    path: str
    fingerprint: str
    kernels: Kernels
    """What it is computed with, attention included."""

    @property
    def layout(self) -> KvLayout:
        """What its KV is."""
        return self.module.layout

    def info(self, name: str, max_context_override: int = 0) -> ModelInfo:
        """For registration; an override of 0 takes the model's context. Raises ConfigError over the limit."""
        limit = self.config.context_limit
        if max_context_override > limit:
            raise ConfigError(f"max_context is {max_context_override}; the model serves at most {limit}", "max_context")
        return ModelInfo(
            name=name,
            path=self.path,
            fingerprint=self.fingerprint,
            vocab_size=self.config.vocab_size,
            max_context=max_context_override or self.config.max_context,
            eos_token_ids=self.config.eos_token_ids,
        )


def load_model(path: Path, dtype: str, device: torch.device, kernels: Kernels | None = None) -> LoadedModel:
    """Reads the checkpoint in folder `path`; without `kernels`, the best that this machine has.

    dtype: "auto" (the checkpoint's), "bfloat16" or "float32". Raises CheckpointError in one line: unsupported
    architecture, rotary kind or dtype, missing, unexpected or wrongly shaped tensors, unreadable files.
    """
    kernels = kernels or choose_kernels("auto", device)
    config = read_config(path)
    fields = Fields.read(path / "config.json")
    family = family_of(fields)
    stored = rename_tensors(find_tensors(path), family)
    chosen = choose_dtype(config, dtype, path)
    module = family.build(config, Place(chosen, device, kernels.ops))
    targets = module.tensors()
    check_tensors(targets, stored, config)
    fill(targets, stored, config)
    return LoadedModel(module, config, chosen, device, str(path), fingerprint(fields, stored), kernels)


def read_config(path: Path) -> ModelConfig:
    """`config.json`, with the end-of-sequence ids of `generation_config.json` before its own."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path}")
    fields = Fields.read(path / "config.json")
    config = family_of(fields).parse(fields)
    generation = path / "generation_config.json"
    ids = Fields.read(generation).token_ids("eos_token_id") if generation.exists() else ()
    config = replace(config, eos_token_ids=tuple(dict.fromkeys(ids + config.eos_token_ids)))
    for token in config.eos_token_ids:
        if token >= config.vocab_size:
            raise CheckpointError(f"{path}: eos_token_id {token} is outside the vocabulary of {config.vocab_size}")
    return config


def choose_dtype(config: ModelConfig, dtype: str, path: Path) -> torch.dtype:
    """The dtype of weights and KV; "auto" serves a float16 checkpoint in bfloat16, whose range does not overflow."""
    name = config.dtype if dtype == "auto" else dtype
    if dtype == "auto" and name == "float16":
        log.info("%s is float16; it is served in bfloat16 (--dtype float32 keeps every bit)", path)
        name = "bfloat16"
    if name not in DTYPES:
        named = f"dtype {name}" if name else "no dtype"
        raise CheckpointError(f"{path}: the checkpoint names {named}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by name: of the single file, or of the shards that the index lists."""
    if (path / SINGLE).exists():
        return read_header(path / SINGLE)
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}")
    index = Fields.read(path / INDEX)
    listed = index.nested("weight_map")
    if listed is None or not all(isinstance(name, str) and Path(name).name == name for name in listed.raw.values()):
        raise CheckpointError(f"{index.where}: weight_map must name a file of this folder for each tensor")
    headers = {name: read_header(path / name) for name in sorted(set(listed.raw.values()))}
    for tensor, file in listed.raw.items():
        if tensor not in headers[file]:
            raise CheckpointError(f"{index.where} places {tensor} in {file}, which does not hold it")
    return {name: stored for header in headers.values() for name, stored in header.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The header of one safetensors file: 8 bytes of length (little-endian), then JSON, then the tensors' bytes."""
    try:
        with file.open("rb") as stream:
            total = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
            if 8 + length > total:
                raise CheckpointError(f"{file} is cut short: {total} bytes")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.start + tensor.size > total:
            raise CheckpointError(f"{file} is cut short: {name} ends at byte {tensor.start + tensor.size} of {total}")
    return tensors


def _stored(file: Path, name: str, entry: Mapping[str, list[int]], base: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(file, name, str(entry["dtype"]), tuple(entry["shape"]), base + start, end - start)


def rename_tensors(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The decoder's tensors under its own names; of a checkpoint saved without its head, "model." goes before all."""
    bare = BARE in stored
    named = {}
    for name, tensor in stored.items():
        own = f"model.{name}" if bare and name != HEAD else family.rename(name)
        if own is not None:
            named[own] = tensor
    return named


def check_tensors(targets: Tensors, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raises CheckpointError for the first tensor that is missing, of another shape, not a float, or not expected."""
    for name, target in targets.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name} is missing; expected shape {list(target.shape)}")
        shape, expected = list(stored[name].shape), list(target.shape)
        if shape != expected:
            raise CheckpointError(f"tensor {name} has shape {shape}; expected {expected} ({stored[name].file})")
        if stored[name].dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(f"tensor {name} has dtype {stored[name].dtype}; expected F32, BF16 or F16")
    for name in sorted(stored.keys() - targets.keys()):
        if not name.endswith(DERIVED_SUFFIXES) and not (name == HEAD and config.tied_embeddings):
            shape = list(stored[name].shape)
            raise CheckpointError(f"tensor {name} of shape {shape} is unexpected: {config.architecture} has none")


def fill(targets: Tensors, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Copies every tensor, file by file, converting to the target's dtype and device."""
    for name, tensor in _read(stored):
        if name in targets:
            targets[name].copy_(tensor)
        elif name == HEAD:
            embedding = targets[EMBEDDING]
            if not torch.equal(tensor.to(embedding), embedding):
                raise CheckpointError("tensor lm_head.weight differs from the embedding; tie_word_embeddings ties them")


def _read(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in an order that has each file open once, the head last (it may be compared with the embedding)."""
    order = sorted(stored, key=lambda name: (name == HEAD, str(stored[name].file), name))
    file: Path | None = None
    handle: Any = None
    for name in order:
        try:
            if stored[name].file != file:
                file = stored[name].file
                handle = safe_open(str(file), framework="pt")
            yield name, handle.get_tensor(stored[name].name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name} of {file}: {error}") from error


def fingerprint(fields: Fields, stored: Mapping[str, StoredTensor]) -> str:
    """32 hex digits, equal for equal models however they are sharded.

    BLAKE2b over what the configuration says of the computation, and of each tensor in order of name: name, dtype,
    shape, and `SAMPLE_BYTES` bytes at its start, middle and end.
    """
    volatile = ("transformers_version", "_name_or_path", "use_cache", "architectures")
    shape = {name: value for name, value in fields.raw.items() if name not in volatile}
    state = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16)
    for name in sorted(stored):
        tensor = stored[name]
        state.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as stream:
            for offset in sorted({0, max(0, tensor.size // 2), max(0, tensor.size - SAMPLE_BYTES)}):
                stream.seek(tensor.start + offset)
                state.update(stream.read(min(SAMPLE_BYTES, tensor.size - offset)))
    return state.hexdigest()
