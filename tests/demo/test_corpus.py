"""The generated corpus: seeded, split without leaks, and made of well-formed chats."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import pytest

from tandem.demo import corpus
from tandem.demo.corpus import Chat
from tandem.demo.families import FAMILIES, HELD_NAMES, TRAIN_NAMES, is_held


def questions(chats: list[Chat]) -> set[str]:
    return {m.content.lower().strip() for chat in chats for m in chat.messages if m.role == "user"}


def test_training_stream_depends_on_the_seed_only() -> None:
    first = list(islice(corpus.training(3), 300))
    assert first == list(islice(corpus.training(3), 300))
    assert first != list(islice(corpus.training(4), 300))


def test_held_out_depends_on_the_seed_only() -> None:
    assert corpus.held_out(5, 100) == corpus.held_out(5, 100)
    assert corpus.held_out(5, 100) != corpus.held_out(6, 100)


def test_every_held_out_chat_has_a_question_unseen_in_training() -> None:
    seen = questions(list(islice(corpus.training(0), 30000)))
    for chat in corpus.held_out(1, 600):
        assert not questions([chat]) <= seen, chat


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_splits_of_a_family_do_not_meet(family: str) -> None:
    generator = FAMILIES[family][0]
    rng = Random(0)
    train = {generator(rng, False)[0].lower() for _ in range(3000)}
    held = {generator(rng, True)[0].lower() for _ in range(1000)}
    assert held and not train & held


def test_names_are_divided() -> None:
    assert HELD_NAMES and not set(HELD_NAMES) & set(TRAIN_NAMES)
    assert all(is_held(name) for name in HELD_NAMES)


def test_chats_alternate_and_end_with_the_assistant() -> None:
    for chat in islice(corpus.training(1), 2000):
        roles = [m.role for m in chat.messages]
        assert all(m.content for m in chat.messages)
        if chat.family == "plain":
            assert roles == ["assistant"]
            continue
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns


def test_json_answers_parse() -> None:
    rng = Random(2)
    for held in (False, True):
        for _ in range(200):
            question, answer = FAMILIES["json"][0](rng, held)
            assert isinstance(json.loads(answer), dict | list)
            assert "JSON" in question


def test_sums_are_right() -> None:
    rng = Random(3)
    for _ in range(500):
        _, answer = FAMILIES["arithmetic"][0](rng, bool(rng.randrange(2)))
        left, operator, right, _, result = answer.split()
        expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator]
        assert int(result) == expected >= 0


def test_memory_answer_is_in_the_chat() -> None:
    chats = [chat for chat in islice(corpus.training(4), 3000) if chat.family == "memory"]
    assert chats
    for chat in chats:
        remembered = chat.answer.rstrip(".").split()[-1]
        assert any(remembered in m.content for m in chat.messages[:-2])
