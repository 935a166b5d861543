"""A tiny tokeniser of every kind that transformers loads, trained on a few sentences.

Each has special and ordinary added tokens, tokens of single bytes where its kind has them, and tokens that begin, end
or consist of spaces and punctuation: what decoders stumble over.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tandem.testing.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    CORPUS,
    END,
    SPECIAL,
    UNKNOWN,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
)

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PUNCTUATION = [" .", " ?", " !", " ,", " ' ", "n't", "'m", "'s", "'ve", "'re", ".", "'", "not", "do"]


def kinds() -> dict[str, Any]:
    """Tokenisers of transformers by the name of their kind."""
    return {
        "gpt2": _with_added(byte_level_tokenizer()),
        "llama2": _with_added(byte_fallback_tokenizer()),
        "gemma": _with_added(gemma_tokenizer()),
        "t5": _with_added(unigram_tokenizer()),
        "unigram, cleaned up": _with_added(unigram_tokenizer(clean_up=True)),
        "unigram, no prefix space": _with_added(unigram_tokenizer(prepend_scheme="never")),
        "bert": _with_added(word_piece_tokenizer()),
        "bert, cleaned up twice": _with_added(word_piece_tokenizer(clean_up=True)),
        "gpt1": _with_added(end_of_word_tokenizer()),
        "words without a decoder": _with_added(word_tokenizer()),
        "every other step": _with_added(many_steps_tokenizer()),
    }


def gemma_tokenizer() -> Any:
    """Sentencepiece BPE with byte fallback and without a prefix space."""
    backend = Backend.from_str(byte_fallback_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap(backend)


def unigram_tokenizer(clean_up: bool = False, prepend_scheme: str = "always") -> Any:
    """Sentencepiece's unigram model (T5, XGLM)."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=[UNKNOWN, *SPECIAL], unk_token=UNKNOWN, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.add_tokens([SPACE, SPACE * 3, f"{SPACE}x{SPACE}y", *(text.replace(" ", SPACE) for text in PUNCTUATION)])
    return wrap(backend, clean_up)


def word_piece_tokenizer(clean_up: bool = False) -> Any:
    """BERT's: `##` before what continues a word, spaces before punctuation removed."""
    backend = Backend(models.WordPiece(unk_token=UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=[UNKNOWN, *SPECIAL], show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.add_tokens([*PUNCTUATION, "##", "####a", "##.", "do not"])
    return wrap(backend, clean_up)


def end_of_word_tokenizer() -> Any:
    """GPT-1's and CLIP's: `</w>` at the end of a word."""
    backend = Backend(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=[UNKNOWN, *SPECIAL], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.add_tokens(["</w>", "a</w>b</w>"])
    return wrap(backend)


def word_tokenizer() -> Any:
    """Whole words, and no decoder: they are joined by spaces."""
    words = [UNKNOWN, *SPECIAL, *sorted({word for text in CORPUS for word in text.split()})]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(backend)


def many_steps_tokenizer() -> Any:
    """Steps as no model has them: a regular expression, more than one space stripped, a pattern across tokens."""
    backend = Backend.from_str(byte_fallback_tokenizer().backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(f"{SPACE}+"), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 2, 0),
            decoders.Replace("tt", "T"),
        ]
    )
    return wrap(backend)


def whole_text_tokenizer() -> Any:
    """A decoder whose text is not certain before its end: a regular expression over joined tokens."""
    backend = Backend.from_str(byte_fallback_tokenizer().backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(f"{SPACE}+"), " ")])
    return wrap(backend)


def wrap(backend: Backend, clean_up: bool = False) -> Any:
    """A transformers tokeniser around `backend`."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, clean_up_tokenization_spaces=clean_up
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _with_added(wrapped: Any) -> Any:
    wrapped.backend_tokenizer.add_tokens(
        [
            AddedToken("<think>", normalized=False),
            AddedToken("naïve", normalized=True, lstrip=True),
            AddedToken("👩\u200d👩\u200d👧", rstrip=True, single_word=True),
            AddedToken("  two  ", normalized=False),
        ]
    )
    wrapped.backend_tokenizer.add_special_tokens(
        [AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("\ufffd", normalized=False), "</tool>"]
    )
    return wrapped


def write_tiktoken(folder: Path) -> None:
    """A checkpoint with Llama 3's original `tokenizer.model`: base64 of each token's bytes, and its rank."""
    backend = byte_level_tokenizer().backend_tokenizer
    from tandem.text.byte_tokens import byte_level_bytes

    vocabulary = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = [byte_level_bytes(spelling) for spelling, _ in vocabulary if spelling not in SPECIAL]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    added = {str(len(tokens) + rank): {"content": token, "special": True} for rank, token in enumerate(SPECIAL)}
    _write_config(folder, added_tokens_decoder=added)


def write_tekken(folder: Path) -> None:
    """A checkpoint with Mistral's `tekken.json`."""
    backend = byte_level_tokenizer().backend_tokenizer
    from tandem.text.byte_tokens import byte_level_bytes

    singles = [bytes([byte]) for byte in range(256)]
    vocabulary = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = [byte_level_bytes(spelling) for spelling, _ in vocabulary if spelling not in SPECIAL]
    tokens = singles + [token for token in tokens if len(token) > 1]
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    state = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + len(specials),
            "default_num_special_tokens": len(specials),
            "version": "v3",
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode("utf-8", "ignore"),
            }
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(specials)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(state))
    _write_config(folder)


def write_sentencepiece(folder: Path, model_type: str = "bpe") -> None:
    """A checkpoint with sentencepiece's `tokenizer.model` (Llama 2). model_type: bpe or unigram."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 4),
            model_writer=out,
            model_type=model_type,
            vocab_size=400,
            byte_fallback=True,
            hard_vocab_limit=False,
            user_defined_symbols=["<think>"],
            control_symbols=["<tool>"],
            minloglevel=2,
        )
    _write_config(folder, tokenizer_class="LlamaTokenizer" if model_type == "bpe" else "T5Tokenizer")


def _write_config(folder: Path, **fields: Any) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
