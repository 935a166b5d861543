"""What is reused of texts tokenised before gives the very ids that the whole text gives, whatever the tokeniser is."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from tandem.testing.tokenizer import ASSISTANT, END, SYSTEM, USER, byte_level_tokenizer
from tandem.testing.tokenizer_kinds import kinds, wrap
from tandem.text.prompt import PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.text.turns import TurnCache

PIECES = [
    END, END, END, SYSTEM, USER, ASSISTANT, "Hello, world!", " The cat", "  two  ", "\n", " ", "   ", "\u0301",
    "\u0338=", "<think>", "<tool>", "</tool>", "naïve", " naïve", "👩\u200d👩\u200d👧", "🙂", "中文",
    "<|end|", "|>", "<", "don't", " .", "x", "\u2581", "##a", "0123", "</w>", "\ufffd", "don", "ING", "ß", "\u200d",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14)


def hostile_kinds() -> dict[str, Tokenizer]:
    """As no model has them: ends of turns that swallow what is around them, that longer tokens begin with, that a
    normaliser takes apart."""
    found = {}
    for name, end in (
        ("strips", AddedToken(END, lstrip=True, rstrip=True, special=True)),
        ("single word", AddedToken(END, single_word=True, special=True)),
        ("normalized", AddedToken(END, normalized=True, special=True)),
    ):
        wrapped = byte_level_tokenizer()
        wrapped.backend_tokenizer.add_special_tokens([end])
        found[name] = wrapped
    longer = byte_level_tokenizer()
    longer.backend_tokenizer.add_tokens([f"{END}x", f"x{END}", f"{END}{END}"])
    found["longer"] = longer
    composed = byte_level_tokenizer()
    composed.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    composed.backend_tokenizer.add_special_tokens([AddedToken(END, normalized=True, special=True)])
    found["composed"] = composed
    return {name: Tokenizer(wrap(wrapped.backend_tokenizer)) for name, wrapped in found.items()}


TOKENIZERS = {**{name: Tokenizer(wrapped) for name, wrapped in kinds().items()}, **hostile_kinds()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), seed=st.integers(0, 1 << 16))
def test_reused_prefixes_give_the_same_ids(name: str, texts: list[list[str]], seed: int) -> None:
    tokenizer, rng = TOKENIZERS[name], random.Random(seed)
    text = PromptTokenizer(tokenizer, TurnCache(rng.choice([2000, 1 << 20])))

    async def ask() -> None:
        for _ in range(8):
            pieces = rng.choice(texts)
            other = rng.choice(texts)
            cut = rng.randrange(len(pieces) + 1)
            asked = "".join([*pieces[:cut], *other[rng.randrange(len(other) + 1) :]])
            prompt = await text.rendered(asked)
            assert list(prompt.ids) == tokenizer.encode(asked), (asked, prompt.reused)
            text.turns.check_integrity()

    asyncio.run(ask())


@pytest.mark.parametrize("name", TOKENIZERS)
async def test_which_tokenisers_have_safe_places(name: str) -> None:
    """Else the test above would hold because nothing is ever reused."""
    text = PromptTokenizer(TOKENIZERS[name])
    start = f"{SYSTEM}The cat sat{END}"
    await text.rendered(f"{start}{USER}Hello{END}{ASSISTANT}")
    again = await text.rendered(f"{start}{USER}How are you{END}{ASSISTANT}")
    assert (again.reused > 0) == (name in SAFE), again.reused


SAFE = frozenset(TOKENIZERS) - {"single word"}
