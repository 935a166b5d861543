"""The demo tokenizer: any text round-trips, and longer chats extend shorter ones token by token."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.demo.corpus import Chat, Message, training
from tandem.demo.tokenizer import END, SPECIAL_TOKENS, encode_text, train_tokenizer
from tandem.demo.train import encode_chat


def make() -> Any:
    texts = (m.content for chat in islice(training(0), 2000) for m in chat.messages)
    return train_tokenizer(texts, 1024)


TOKENIZER = make()
text_without_markup = st.text(max_size=80).filter(lambda s: not any(token in s for token in SPECIAL_TOKENS))


def render(messages: list[dict[str, str]], prompt: bool) -> list[int]:
    ids: list[int] = TOKENIZER.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    return ids


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@given(text_without_markup)
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(encode_text(TOKENIZER, text)) == text


def test_every_byte_is_in_the_vocabulary() -> None:
    assert len(TOKENIZER) <= 1024
    single = [token for token in TOKENIZER.get_vocab() if len(token) == 1]
    assert len(single) == 256


def test_special_tokens_are_single_ids_and_end_is_eos() -> None:
    for token in SPECIAL_TOKENS:
        assert len(encode_text(TOKENIZER, token)) == 1
    assert TOKENIZER.eos_token == END


@given(text_without_markup, text_without_markup, text_without_markup, st.booleans())
@settings(max_examples=100, deadline=None)
def test_next_turn_extends_the_tokens_of_the_last(question: str, answer: str, more: str, system: bool) -> None:
    head = [{"role": "system", "content": "Be concise and correct."}] if system else []
    before = render([*head, user(question)], True)
    generated = [*encode_text(TOKENIZER, answer), TOKENIZER.eos_token_id]
    after = render([*head, user(question), {"role": "assistant", "content": answer}, user(more)], True)
    assert after[: len(before) + len(generated)] == before + generated


def test_unknown_role_and_non_text_content_are_refused() -> None:
    with pytest.raises(Exception, match="unknown role 'tool'"):
        render([{"role": "tool", "content": "x"}], True)
    with pytest.raises(Exception, match="must be a string"):
        TOKENIZER.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "x"}]}])


def test_training_examples_are_what_the_template_renders() -> None:
    for chat in islice(training(7), 200):
        if chat.family == "plain":
            continue
        messages = [*chat.prompt(), {"role": "assistant", "content": chat.answer}]
        assert list(encode_chat(TOKENIZER, chat).ids) == render(messages, False)


def test_only_assistant_text_and_its_end_are_learnt() -> None:
    chat = Chat("x", (Message("user", "Hello!"), Message("assistant", "Goodbye!")))
    example = encode_chat(TOKENIZER, chat)
    learnt = [token for token, learn in zip(example.ids, example.learn, strict=True) if learn]
    assert learnt == [*encode_text(TOKENIZER, "Goodbye!"), TOKENIZER.eos_token_id]
