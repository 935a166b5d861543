"""The tokens of a model as grammars see them: bytes, or nothing for a token that is no text."""

from __future__ import annotations

from collections.abc import Sequence

import xgrammar
from transformers import AutoTokenizer

UNSPELLABLE = b"\xff"
"""No UTF-8 text has this byte."""


def load_vocabulary(folder: str, vocab_size: int, stop_ids: Sequence[int]) -> xgrammar.TokenizerInfo:
    """Reads the tokeniser in `folder`.

    vocab_size: the model's, which may be larger than the tokeniser's. stop_ids: what may follow a complete text.
    Special tokens are no text: no text in a grammar spells them, whatever their names are; structural tags may ask for
    one by its id. (XGrammar never takes a token without any bytes.) Raises ValueError, OSError.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_ids) or None
    )
    texts = list(found.decoded_vocab)
    added = tokenizer.added_tokens_decoder.items()
    for token in {*tokenizer.all_special_ids, *(token for token, about in added if about.special)}:
        if token < len(texts):
            texts[token] = b"" if token in found.stop_token_ids else UNSPELLABLE + texts[token]
    return xgrammar.TokenizerInfo(
        texts,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(found.stop_token_ids),
        add_prefix_space=found.add_prefix_space,
    )
