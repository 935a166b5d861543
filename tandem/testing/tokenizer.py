"""Tiny tokenisers for tests, byte-level BPE and a sentencepiece-like one with byte fallback, and a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

USER, ASSISTANT, SYSTEM, END, BOS = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|bos|>"
UNKNOWN = "<unk>"
SPECIAL = (BOS, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CORPUS = (
    "The cat sat on the mat. The dog sat on the log. Hello, world! How are you today?",
    "Naïve café über façade — 中文字符 日本語 한국어 🙂🙃 emoji. Numbers: 0123456789.",
    "A router decides where each request goes; a worker computes keys and values.",
    'print("hello") if x == y else None; def f(x): return x ** 2  # comment\n\n',
)


def byte_level_tokenizer(vocab_size: int = 400) -> Any:
    """A transformers tokeniser over byte-level BPE; every text round-trips."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return _wrap(backend)


def byte_fallback_tokenizer(vocab_size: int = 500) -> Any:
    """A transformers tokeniser in the manner of Llama 2: U+2581 for spaces, `<0x..>` tokens for unknown characters."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [UNKNOWN, *SPECIAL]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials + fallback, show_progress=False)
    ascii_only = [text.encode("ascii", "ignore").decode().replace(" ", "\u2581") for text in CORPUS]
    backend.train_from_iterator(ascii_only * 4, trainer)
    return _wrap(_only_special(backend, fallback))


def _only_special(backend: Backend, ordinary: list[str]) -> Backend:
    """The trainer marks all tokens given to it as special; byte tokens are not."""
    import json

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in ordinary]
    return Backend.from_str(json.dumps(state))


def _wrap(backend: Backend) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
