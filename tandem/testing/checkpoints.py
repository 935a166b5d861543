"""Random checkpoints of any supported family and shape, small enough to make in a second, complete enough to serve.

    python -m tandem.testing.checkpoints OUT --family qwen2 --hidden 64 --heads 4 --kv-heads 2 --seed 7

Their weights are wide on purpose. At the customary deviation of 0.02 a small random model's attention is nearly uniform
and a wrong rotary offset changes no greedy token; from 0.1 on, a wrong offset, page or head does.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
LARGEST_VOCAB = SMALLEST_VOCAB + 26**2 + 26**3


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """A checkpoint's shape and randomness. The same spec always gives the same bytes."""

    family: str = "llama"
    """transformers' `model_type`, such as llama or qwen2"""
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 128
    vocab: int = 512
    max_positions: int = 4096
    tied: bool = False
    dtype: str = "float32"
    shards: int = 1
    """Files that the tensors are spread over; more than 1 come with an index."""
    std: float = 0.15
    """Standard deviation of matrices and embeddings; norms (1, Gemma's 0) and biases (0) get as much noise."""
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    """Further fields of config.json, such as rope_parameters or attention_bias."""


def make_checkpoint(path: Path, spec: CheckpointSpec) -> Path:
    """Writes configuration, weights and tokenizer into folder `path`, which is made, and returns it.

    Raises ValueError when the vocabulary is too small or too large for the tokenizer.
    """
    path.mkdir(parents=True, exist_ok=True)
    make_tokenizer(spec.vocab).save_pretrained(path)
    model = make_model(spec)
    model.config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    _write_weights(path, model, spec)
    return path


def make_config(spec: CheckpointSpec) -> Any:
    """The `transformers` configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        spec.family,
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied,
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        bos_token_id=SPECIAL_TOKENS.index("<|bos|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|end|>"),
        **spec.config,
    )


def make_model(spec: CheckpointSpec) -> Any:
    """The `transformers` model itself, in evaluation mode, for comparison."""
    from transformers import AutoModelForCausalLM

    config = make_config(spec)
    dtype = getattr(torch, spec.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    config.architectures, config.dtype = [type(model).__name__], spec.dtype
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator) * spec.std
            weight.copy_(noise + weight if "norm" in name else noise)
    return model


def make_tokenizer(vocab: int) -> Any:
    """A byte-level BPE tokenizer of exactly `vocab` ids: specials, all bytes, then pairs and triples of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not SMALLEST_VOCAB <= vocab <= LARGEST_VOCAB:
        raise ValueError(f"vocab is {vocab}; it must be in [{SMALLEST_VOCAB}, {LARGEST_VOCAB}]")
    letters = string.ascii_lowercase
    pairs = [(first, second) for first in letters for second in letters]
    merges = pairs + [(first + second, third) for first, second in pairs for third in letters]
    merges = merges[: vocab - SMALLEST_VOCAB]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, end, *turns = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=end,
        unk_token=pad,  # never produced by bytes, but transformers would add one of its own behind the vocabulary
        additional_special_tokens=turns,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _write_weights(path: Path, model: Any, spec: CheckpointSpec) -> None:
    """One file, or `shards` files of every n-th tensor with their index."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if spec.tied:
        tensors.pop("lm_head.weight", None)
    if spec.shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, places = sorted(tensors), {}
    for shard in range(spec.shards):
        file = f"model-{shard + 1:05d}-of-{spec.shards:05d}.safetensors"
        part = names[shard :: spec.shards]
        places.update(dict.fromkeys(part, file))
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    default = CheckpointSpec()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    for name in ("family", "dtype"):
        parser.add_argument(f"--{name}", default=getattr(default, name))
    sizes = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_positions")
    for name in (*sizes, "shards", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--std", type=float, default=default.std)
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output layer")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON object of further fields of config.json")
    options = vars(parser.parse_args(arguments))
    make_checkpoint(options.pop("out"), CheckpointSpec(**options))


if __name__ == "__main__":
    main()
