"""Remembered turns: the cache by itself, and splicing against plain tokenising."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.testing.tokenizer import END, byte_fallback_tokenizer, byte_level_tokenizer
from tandem.text.detokenizer import detokenizer
from tandem.text.prompt import Prompt, PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.text.turns import Boundaries, TurnCache

TOKENIZERS = {"byte_level": Tokenizer(byte_level_tokenizer()), "byte_fallback": Tokenizer(byte_fallback_tokenizer())}
SENTENCES = [
    "Hello, world! How are you today?",
    "naïve café 🙂",
    "",
    " 12 34",
    "x == y  \n\n",
    "<|end|>",
    "The cat sat",
]


def speak(tokenizer: Tokenizer, rng: random.Random, prompt: Prompt) -> tuple[list[int], str]:
    """An answer as a model samples it: ids that are seldom those its text would be tokenised to."""
    ordinary = [i for i in range(tokenizer.size) if i not in tokenizer.special_ids]
    ids = tokenizer.encode(rng.choice(SENTENCES[:2])) + rng.choices(ordinary, k=rng.randrange(12))
    stream = detokenizer(tokenizer, prompt.ids[-8:])
    return ids, "".join([*(stream.feed(token) for token in ids), stream.finish()])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), max_bytes=st.sampled_from([2000, 20_000, 1 << 20]))
def test_spliced_prompts_decode_to_the_rendered_text(name: str, seed: int, max_bytes: int) -> None:
    tokenizer, rng = TOKENIZERS[name], random.Random(seed)
    text = PromptTokenizer(tokenizer, TurnCache(max_bytes))
    conversations: list[list[dict[str, str]]] = [[]]

    async def turns() -> None:
        for _ in range(8):
            history = rng.choice(conversations)
            messages = [*history, {"role": "user", "content": rng.choice(SENTENCES)}]
            prompt = await text.chat(messages, salt=rng.choice(["", "a"]))
            text.turns.check_integrity()
            plain = tokenizer.encode(tokenizer.render(messages))
            spliced_text, plain_text = tokenizer.decode(prompt.ids, False), tokenizer.decode(plain, False)
            if name == "byte_fallback":  # plain encoding itself adds a space after each special token
                spliced_text, plain_text = spliced_text.replace(" ", ""), plain_text.replace(" ", "")
            assert spliced_text == plain_text
            if prompt.reused == 0:
                assert list(prompt.ids) == plain
            ids, said = speak(tokenizer, rng, prompt)
            text.remember(prompt, ids, said)
            text.turns.check_integrity()
            conversations.append([*messages, {"role": "assistant", "content": said}])

    asyncio.run(turns())


@pytest.mark.parametrize("name", TOKENIZERS)
async def test_the_next_turn_starts_with_the_sampled_ids(name: str) -> None:
    tokenizer, text = TOKENIZERS[name], PromptTokenizer(TOKENIZERS[name])
    question = [{"role": "user", "content": "Hi"}]
    prompt = await text.chat(question)
    sampled = [token for char in "Hello there" for token in tokenizer.encode(char)]
    stream = detokenizer(tokenizer, prompt.ids)
    said = "".join(stream.feed(token) for token in sampled) + stream.finish()
    assert text.remember(prompt, sampled, said)
    following = [*question, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    again = await text.chat(following)
    end = tokenizer.encode(END)[-1]
    assert again.ids[: len(prompt.ids) + len(sampled) + 1] == (*prompt.ids, *sampled, end)
    assert again.reused == len(prompt.ids) + len(sampled) + 1
    assert list(again.ids) != tokenizer.encode(tokenizer.render(following))
    other_tenant = await text.chat(following, salt="other")
    assert other_tenant.reused == 0


async def test_an_answer_that_is_not_its_text_is_not_remembered() -> None:
    tokenizer, text = TOKENIZERS["byte_level"], PromptTokenizer(TOKENIZERS["byte_level"])
    prompt = await text.chat([{"role": "user", "content": "Hi"}])
    before = len(text.turns)
    user = tokenizer.encode("<|user|>")[0]
    assert not text.remember(prompt, tokenizer.encode("Hello"), "Hell")
    assert not text.remember(prompt, [*tokenizer.encode("Hello"), user], "Hello")
    assert not text.remember(prompt, [], "")
    assert len(text.turns) == before


class Uncopied(tuple[int, ...]):
    """Ids of which parts may be taken."""

    __slots__ = ()

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all of the prompt is copied")


async def test_of_a_long_prompt_an_answer_copies_what_follows_its_last_boundary() -> None:
    tokenizer, text = TOKENIZERS["byte_level"], PromptTokenizer(TOKENIZERS["byte_level"])
    question = [{"role": "user", "content": "Hi"}]
    prompt = await text.chat(question)
    for said in ("Hello", "Ho"):  # as two choices of one request
        assert text.remember(replace(prompt, ids=Uncopied(prompt.ids)), tokenizer.encode(said), said)
        answer = {"role": "assistant", "content": said}
        again = await text.chat([*question, answer, *question])
        assert again.reused == len(prompt.ids) + len(tokenizer.encode(said)) + 1


async def test_a_shared_system_prompt_is_tokenised_once() -> None:
    text = PromptTokenizer(TOKENIZERS["byte_level"])
    system = {"role": "system", "content": "You are terse. " * 20}
    first = await text.chat([system, {"role": "user", "content": "Hi"}])
    second = await text.chat([system, {"role": "user", "content": "Ho"}])
    assert first.reused == 0
    assert second.reused > 40
    assert list(second.ids) == text.tokenizer.encode(text.tokenizer.render([system, {"role": "user", "content": "Ho"}]))


async def test_a_conversation_over_the_limit_is_known_and_not_remembered() -> None:
    text = PromptTokenizer(TOKENIZERS["byte_level"])
    question = [{"role": "user", "content": "Hi"}]
    await text.chat(question)
    turns = list(text.turns._turns)
    for long in (question + question, [{"role": "user", "content": "Ho"}]):
        rendered = text.tokenizer.render(long)
        ids = tuple(text.tokenizer.encode(rendered))
        refused = await text.rendered(rendered, limit=len(ids) - 1)
        assert refused.ids == ids
        assert not text.remember(refused, text.tokenizer.encode("Ha"), "Ha")
        assert list(text.turns._turns) == turns
        assert (await text.rendered(rendered, limit=len(ids))).conversation is not None
        assert len(text.turns) > len(turns)
        turns = list(text.turns._turns)


async def test_a_text_full_of_turn_ends_costs_bounded_work() -> None:
    text = PromptTokenizer(TOKENIZERS["byte_level"])
    messages = [{"role": "user", "content": END * 5000}]
    first, second = await text.chat(messages), await text.chat(messages)
    assert first.ids == second.ids
    assert len(text.turns) <= 1024
    text.turns.check_integrity()


def test_a_template_without_special_turn_ends_is_tokenised_whole() -> None:
    wrapped = byte_level_tokenizer()
    wrapped.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    text = PromptTokenizer(Tokenizer(wrapped))
    prompt = asyncio.run(text.chat([{"role": "user", "content": "Hi"}]))
    assert text.turn_end is None
    assert prompt.conversation is None


def test_keys_depend_on_salt_and_text_only() -> None:
    whole = Boundaries(f"a{END}b{END}", END, "salt")
    assert [each.position for each in whole.found] == [8, 16]
    assert Boundaries("a", END, "salt").extended(END) == whole.found[0].key
    assert Boundaries(f"a{END}", END, "salt").extended(f"b{END}") == whole.found[1].key
    assert Boundaries(f"a{END}", END, "sal").found[0].key != Boundaries(f"a{END}", END, "salt").found[0].key
    assert Boundaries(f"ta{END}", END, "sal").found[0].key != whole.found[0].key


class Turns(RuleBasedStateMachine):
    """Any order of adding, looking up and overflowing keeps the cache consistent, and it never gives wrong ids."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = TurnCache(max_bytes=6000)
        self.model: dict[str, tuple[int, ...]] = {}

    def boundaries(self, text: str) -> Boundaries:
        return Boundaries(text, ";", "")

    @rule(base=st.integers(0, 30), more=st.text("ab", max_size=60))
    def add(self, base: int, more: str) -> None:
        texts = ["", *self.model]
        text = texts[base % len(texts)] + more + ";"
        found = self.boundaries(text).found
        match = self.cache.longest(found)
        ids = tuple(map(ord, text))
        after = (match[1], match[0].position) if match else None
        turn = self.cache.add(found[-1].key, ids, len(ids), after)
        assert turn.all_ids() == list(ids)
        self.model[text] = ids

    @rule(pick=st.integers(0, 30))
    def look_up(self, pick: int) -> None:
        if not self.model:
            return
        text = list(self.model)[pick % len(self.model)]
        match = self.cache.longest(self.boundaries(text).found)
        if match is not None:
            boundary, turn = match
            assert turn.all_ids() == list(map(ord, text[: boundary.position]))

    @invariant()
    def consistent(self) -> None:
        self.cache.check_integrity()


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
