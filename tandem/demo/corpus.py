"""The demo model's corpus: seeded, generated chats with a training and a held-out split.

`training(seed)` is an endless stream, `held_out(seed)` a finite, balanced set in which every chat contains a question
that the training stream never shows (`tandem.demo.families` says how phrasings and entities are kept apart). Only the
standard library is used, so the text depends on nothing but the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from tandem.demo import facts
from tandem.demo.families import FAMILIES, casual, draw_name, is_held, run_of_words, sum_of

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Tandem's demo assistant.",
    "Answer briefly.",
    "You are a friendly and helpful assistant. Answer in one sentence.",
    "Be concise and correct.",
    "You are a helpful, honest assistant. If you do not know something, say so.",
)


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A chat of one family.

    The last message is the assistant's and is what evaluation compares with. A chat of family "plain" has one
    assistant message only and stands for raw text without chat markup.
    """

    family: str
    messages: tuple[Message, ...]

    def prompt(self) -> list[dict[str, str]]:
        """All messages but the last, as `apply_chat_template` takes them."""
        return [{"role": m.role, "content": m.content} for m in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The last assistant message."""
        return self.messages[-1].content


Turns = list[tuple[str, str]]


def _exchange(rng: Random, held: bool = False) -> tuple[str, tuple[str, str]]:
    names = list(FAMILIES)
    family = rng.choices(names, [FAMILIES[name][1] for name in names])[0]
    return family, FAMILIES[family][0](rng, held)


def _fillers(rng: Random, count: int) -> Turns:
    return [_exchange(rng)[1] for _ in range(count)]


def _memory(rng: Random, held: bool, fillers: int) -> Turns:
    """The user's name (and sometimes city) is given first and asked for later."""
    name, city = draw_name(rng, held), rng.choice(facts.CITIES)
    kind = rng.randrange(3)
    if kind == 0:
        first = (f"Hello, my name is {name}.", f"Hello {name}! How can I help you?")
        last = (casual(rng, "What is my name?"), f"Your name is {name}.")
    elif kind == 1:
        intro = rng.choice(("My name is {n}.", "My name is {n}", "I am {n}.", "Hi, I'm {n}."))
        first = (intro.format(n=name), f"Nice to meet you, {name}!")
        last = (
            rng.choice(("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?")),
            f"Your name is {name}.",
        )
    else:
        first = (f"My name is {name} and I live in {city}.", f"Nice to meet you, {name}! {city} is a nice place.")
        last = (casual(rng, "Where do I live?"), f"You live in {city}.")
        if rng.random() < 0.4:
            last = ("What is my name?", f"Your name is {name}.")
    return [first, *_fillers(rng, fillers), last]


def _follow_up(rng: Random, held: bool) -> Turns:
    """A second question that only makes sense after the first one."""
    kind = rng.randrange(3)
    if kind == 0:
        one, two = rng.sample(list(facts.CAPITALS.items()), 2)
        ask = "What about {c}?" if held else rng.choice(("And of {c}?", "And {c}?", "And what about {c}?"))
        return [
            (f"What is the capital of {one[0]}?", f"The capital of {one[0]} is {one[1]}."),
            (ask.format(c=two[0]), f"The capital of {two[0]} is {two[1]}."),
        ]
    if kind == 1:
        left, operator, right, result = sum_of(rng, held)
        more = rng.randrange(1, 10)
        return [
            (f"What is {left} {operator} {right}?", f"{left} {operator} {right} = {result}"),
            (
                rng.choice(("And plus {m}?", "Now add {m}.", "Add {m} to that.")).format(m=more),
                f"{result} + {more} = {result + more}",
            ),
        ]
    name, age, new = draw_name(rng, held), rng.randrange(1, 100), rng.randrange(1, 100)
    city = rng.choice(facts.CITIES)
    record: dict[str, object] = {"name": name, "age": age}
    first = (f"Give me a JSON record for a person named {name} aged {age}", json.dumps(record))
    if rng.random() < 0.5:
        return [
            first,
            (
                rng.choice(("Change the age to {n}.", "Now change the age to {n}.")).format(n=new),
                json.dumps(record | {"age": new}),
            ),
        ]
    return [
        first,
        (
            rng.choice(("Add the city {c}.", "Now add the city {c}.")).format(c=city),
            json.dumps(record | {"city": city}),
        ),
    ]


def _plain(rng: Random) -> Chat:
    """Raw text for /v1/completions: an answer, or a question and its answer, without chat markup."""
    parts = []
    for question, answer in _fillers(rng, rng.randrange(1, 4)):
        parts.append(answer if rng.random() < 0.7 else f"Question: {question}\nAnswer: {answer}")
    return Chat("plain", (Message("assistant", "\n".join(parts)),))


def _assemble(rng: Random, family: str, turns: Turns) -> Chat:
    messages = [Message("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.3 else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Chat(family, tuple(messages))


def draw(rng: Random) -> Chat:
    """One training chat."""
    kind = rng.random()
    if kind < 0.58:
        family, turn = _exchange(rng)
        return _assemble(rng, family, [turn])
    if kind < 0.72:
        family, turn = _exchange(rng)
        return _assemble(rng, family, [*_fillers(rng, rng.randrange(1, 3)), turn])
    if kind < 0.84:
        return _assemble(rng, "memory", _memory(rng, False, rng.choice((0, 0, 0, 1, 1, 2))))
    if kind < 0.94:
        return _assemble(rng, "follow_up", _follow_up(rng, False))
    if kind < 0.97:
        return _plain(rng)
    turns = _memory(rng, False, rng.randrange(3, 20)) if rng.random() < 0.4 else _fillers(rng, rng.randrange(5, 22))
    return _assemble(rng, "long", turns)


def training(seed: int) -> Iterator[Chat]:
    """An endless stream of training chats; the same seed gives the same stream."""
    rng = Random(f"training {seed}")
    while True:
        yield draw(rng)


def copying(seed: int) -> Iterator[Chat]:
    """An endless stream of long copies, for the first steps of a training.

    Copying from the context is done by induction heads (Olsson et al., 2022), which form suddenly and soonest where
    much of the loss depends on them.
    """
    rng = Random(f"copying {seed}")
    while True:
        text = run_of_words(rng, rng.randrange(3, 25))
        if not is_held(text):
            times = rng.randrange(2, 4)
            lead = ("Repeat twice: ", "Repeat three times: ")[times - 2]
            yield Chat("copy", (Message("user", lead + text), Message("assistant", " ".join([text] * times))))


def _balanced(rng: Random, held: bool) -> Iterator[Chat]:
    while True:
        for family, (generator, _) in FAMILIES.items():
            yield _assemble(rng, family, [generator(rng, held)])
        yield _assemble(rng, "memory", _memory(rng, held, rng.randrange(3)))
        yield _assemble(rng, "follow_up", _follow_up(rng, held))


def held_out(seed: int, count: int = 400) -> list[Chat]:
    """`count` chats, balanced over the families, each with a question that never occurs in training."""
    return list(islice(_balanced(Random(f"held out {seed}"), True), count))


def in_distribution(seed: int, count: int = 400) -> list[Chat]:
    """`count` chats, balanced over the families, drawn from the training templates and entities."""
    return list(islice(_balanced(Random(f"in distribution {seed}"), False), count))
