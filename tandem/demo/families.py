"""Generators of single question/answer exchanges, one function a family.

Every generator is `(rng, held) -> (question, answer)`. With `held` false it draws only from training templates and
entities, with `held` true only from those kept back for evaluation, so a held-out question never occurs in training.
Families over closed tables of facts keep back a phrasing (the last of each list); open families keep back the entities
whose CRC-32 is divisible by `HELD_MODULUS`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from random import Random

from tandem.demo import about, facts

Generator = Callable[[Random, bool], tuple[str, str]]
HELD_MODULUS = 8


def is_held(key: str) -> bool:
    """Whether an entity of an open family belongs to the held-out split."""
    return zlib.crc32(key.encode()) % HELD_MODULUS == 0


def split_entities(items: Sequence[str], held: bool) -> list[str]:
    """The members of `items` that belong to the asked split."""
    return [item for item in items if is_held(item) == held]


TRAIN_NAMES = split_entities(facts.NAMES, held=False)
HELD_NAMES = split_entities(facts.NAMES, held=True)


def made_up(rng: Random) -> str:
    """A pronounceable string that is no word."""
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randrange(1, 4)))


def draw_name(rng: Random, held: bool) -> str:
    """A first name of the asked split; for training at times a made-up one, so that any name can be copied."""
    if held:
        return rng.choice(HELD_NAMES)
    if rng.random() < 0.3:
        name = (rng.choice("AEIOU") if rng.random() < 0.3 else "") + made_up(rng) + rng.choice(("", "n", "s", "l"))
        if name.capitalize() not in HELD_NAMES:
            return name.capitalize()
    return rng.choice(TRAIN_NAMES)


def pick(rng: Random, templates: Sequence[str], held: bool) -> str:
    """A phrasing: the last one is kept back, the others are for training."""
    return templates[-1] if held else rng.choice(templates[:-1])


def article(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def casual(rng: Random, question: str) -> str:
    """Now and then the question as people type it: lower case, no question mark, or with a please."""
    style = rng.random()
    if style < 0.08:
        return question.lower()
    if style < 0.16:
        return question.lower().rstrip("?.")
    if style < 0.22:
        return question.rstrip("?.")
    if style < 0.26:
        return "Please tell me: " + question
    if style < 0.28:
        return question + " "
    return question


def _fact(rng: Random, held: bool, templates: Sequence[str], answer: str, **slots: str) -> tuple[str, str]:
    return casual(rng, pick(rng, templates, held).format(**slots)), answer.format(**slots)


def capital(rng: Random, held: bool) -> tuple[str, str]:
    """Capital of a country, and sometimes the country of a capital."""
    country, city = rng.choice(list(facts.CAPITALS.items()))
    if rng.random() < 0.75:
        templates = (
            "What is the capital of {c}?",
            "What's the capital of {c}?",
            "Name the capital of {c}.",
            "Which city is the capital of {c}?",
            "Tell me the capital of {c}.",
            "Capital of {c}?",
            "Do you know the capital of {c}?",
        )
        return _fact(rng, held, templates, "The capital of {c} is {k}.", c=country, k=city)
    reverse = (
        "{k} is the capital of which country?",
        "Of which country is {k} the capital?",
        "Which country has the capital {k}?",
    )
    return _fact(rng, held, reverse, "{k} is the capital of {c}.", c=country, k=city)


def language(rng: Random, held: bool) -> tuple[str, str]:
    """Language spoken in a country."""
    country, tongue = rng.choice(list(facts.LANGUAGES.items()))
    templates = (
        "What language is spoken in {c}?",
        "Which language do people speak in {c}?",
        "What do people speak in {c}?",
        "Which language is spoken in {c}?",
    )
    return _fact(rng, held, templates, "People in {c} speak {k}.", c=country, k=tongue)


def element(rng: Random, held: bool) -> tuple[str, str]:
    """Chemical symbol of an element, or the element of a symbol."""
    name, symbol = rng.choice(list(facts.ELEMENTS.items()))
    if rng.random() < 0.7:
        templates = (
            "What is the chemical symbol for {e}?",
            "What is the chemical symbol of {e}?",
            "What is the symbol for {e}?",
            "Give me the chemical symbol of {e}.",
            "Which symbol does {e} have?",
        )
        return _fact(rng, held, templates, "The chemical symbol for {e} is {s}.", e=name, s=symbol)
    question = pick(
        rng, ("Which element has the symbol {s}?", "What element is {s}?", "{s} is the symbol of which element?"), held
    )
    return question.format(s=symbol), f"{symbol} is the chemical symbol for {name}."


def animal(rng: Random, held: bool) -> tuple[str, str]:
    """Sounds, young and legs of animals."""
    kind = rng.randrange(3)
    if kind == 0:
        name, sound = rng.choice(list(facts.SOUNDS.items()))
        templates = (
            "What sound does {a} make?",
            "Which sound does {a} make?",
            "What does {a} say?",
            "What noise does {a} make?",
        )
        return _fact(rng, held, templates, "{b} goes {s}.", a=article(name), b=article(name).capitalize(), s=sound)
    if kind == 1:
        name, young = rng.choice(list(facts.YOUNG.items()))
        templates = (
            "What is a young {a} called?",
            "What is a baby {a} called?",
            "What do you call a baby {a}?",
            "What do you call a young {a}?",
        )
        return _fact(rng, held, templates, "A young {a} is called {y}.", a=name, y=article(young))
    name, legs = rng.choice(list(facts.LEGS.items()))
    counts = ("How many legs does {a} have?", "How many legs has {a}?", "What number of legs does {a} have?")
    return _fact(rng, held, counts, "{b} has {n} legs.", a=article(name), b=article(name).capitalize(), n=legs)


def colour(rng: Random, held: bool) -> tuple[str, str]:
    """Colour of a thing."""
    thing, hue = rng.choice(list(facts.COLOURS.items()))
    templates = ("What colour is {t}?", "What color is {t}?", "Which colour does {t} have?", "Which colour is {t}?")
    answer = f"{thing[0].upper()}{thing[1:]} is {hue}."
    return casual(rng, pick(rng, templates, held).format(t=thing)), answer


def opposite(rng: Random, held: bool) -> tuple[str, str]:
    """Opposite of a word, either way round."""
    pair = rng.choice(list(facts.OPPOSITES.items()))
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    templates = (
        "What is the opposite of {w}?",
        "What's the opposite of {w}?",
        "Name the opposite of {w}.",
        "Tell me the opposite of {w}.",
    )
    return _fact(rng, held, templates, "The opposite of {w} is {o}.", w=word, o=other)


def general(rng: Random, held: bool) -> tuple[str, str]:
    """Single facts with two phrasings each; the second is held out."""
    first, second, answer = rng.choice(facts.MISC)
    return casual(rng, second if held else first), answer


def calendar(rng: Random, held: bool) -> tuple[str, str]:
    """The day or month before or after another one."""
    names, word = rng.choice(((facts.WEEKDAYS, "day"), (facts.MONTHS, "month")))
    at = rng.randrange(len(names))
    if rng.random() < 0.5:
        templates = (
            "What {w} comes after {x}?",
            "Which {w} comes after {x}?",
            "What {w} follows {x}?",
            "Which {w} follows {x}?",
        )
        return _fact(rng, held, templates, "{y} comes after {x}.", w=word, x=names[at], y=names[(at + 1) % len(names)])
    before = ("What {w} comes before {x}?", "What is the {w} before {x}?", "Which {w} comes before {x}?")
    return _fact(rng, held, before, "{y} comes before {x}.", w=word, x=names[at], y=names[at - 1])


def sum_of(rng: Random, held: bool) -> tuple[int, str, int, int]:
    """A small calculation of the asked split: (left, operator, right, result)."""
    while True:
        operator = rng.choices("+-*", (6, 3, 2))[0]
        high = rng.choice((10, 20, 20, 50)) if operator != "*" else rng.choice((10, 13))
        left, right = rng.randrange(high), rng.randrange(high)
        if operator == "-" and right > left:
            left, right = right, left
        if is_held(f"{left}{operator}{right}") == held:
            return left, operator, right, {"+": left + right, "-": left - right, "*": left * right}[operator]


def arithmetic(rng: Random, held: bool) -> tuple[str, str]:
    """Additions and subtractions of numbers below 50, multiplications up to 12 times 12."""
    left, operator, right, result = sum_of(rng, held)
    word = {"+": "plus", "-": "minus", "*": "times"}[operator]
    templates = (
        "What is {l} {o} {r}?",
        "What's {l} {o} {r}?",
        "Calculate {l} {o} {r}.",
        "{l} {o} {r} = ?",
        "How much is {l} {o} {r}?",
        "What is {l} {w} {r}?",
        "{l}{o}{r}",
    )
    weights = (6, 1, 1, 1, 1, 2, 1)
    question = rng.choices(templates, weights)[0].format(l=left, o=operator, r=right, w=word)
    return question, f"{left} {operator} {right} = {result}"


def _record(rng: Random, held: bool) -> tuple[str, dict[str, object]]:
    name, age = draw_name(rng, held), rng.randrange(1, 100)
    kind = rng.randrange(6)
    if kind <= 1:
        return f"a person named {name} aged {age}", {"name": name, "age": age}
    if kind == 2:
        city = rng.choice(facts.CITIES)
        return f"a person named {name} aged {age} from {city}", {"name": name, "age": age, "city": city}
    if kind == 3:
        job, city = rng.choice(facts.JOBS), rng.choice(facts.CITIES)
        value: dict[str, object] = {"name": name, "job": job, "address": {"city": city}}
        return f"{article(job)} named {name} who lives in {city}", value
    if kind == 4:
        hobbies = rng.sample(facts.HOBBIES, rng.randrange(2, 4))
        listed = ", ".join(hobbies[:-1]) + " and " + hobbies[-1]
        return f"a person named {name} aged {age} who likes {listed}", {"name": name, "age": age, "hobbies": hobbies}
    fruit, count = rng.choice(facts.FRUIT), rng.randrange(1, 50)
    value = {"customer": {"name": name}, "item": fruit, "quantity": count}
    return f"an order by {name} of the item {fruit}, quantity {count}", value


def json_record(rng: Random, held: bool) -> tuple[str, str]:
    """Flat, nested and list-valued JSON records described in words; held out by name."""
    if rng.random() < 0.12:
        names = [draw_name(rng, held) for _ in range(rng.randrange(2, 5))]
        return "Give me a JSON list of the names " + ", ".join(names), json.dumps(names)
    description, value = _record(rng, held)
    templates = (
        "Give me a JSON record for {d}",
        "Give me a JSON record for {d}.",
        "Write a JSON record for {d}.",
        "Make a JSON object for {d}.",
        "I need a JSON record for {d}.",
    )
    return rng.choices(templates, (4, 2, 1, 1, 1))[0].format(d=description), json.dumps(value)


def tandem(rng: Random, held: bool) -> tuple[str, str]:
    """What Tandem is, its words and how it works."""
    if rng.random() < 0.5:
        questions, kept, answer = rng.choice(about.QUESTIONS)
        return casual(rng, kept if held else rng.choice(questions)), answer
    term, answer = about.TERMS[0] if rng.random() < 0.15 else rng.choice(about.TERMS)
    templates = (
        "What is {t}?",
        "What's {t}?",
        "Explain {t}.",
        "What is {t} in Tandem?",
        "Tell me about {t}.",
        "What does {t} mean?",
        "Can you explain {t}?",
    )
    return casual(rng, pick(rng, templates, held).format(t=term)), answer


def copy(rng: Random, held: bool) -> tuple[str, str]:
    """Repeat a run of words, names, numbers or made-up strings, once or several times; held out by the run."""
    while True:
        text = run_of_words(rng, rng.choice((1, 2, 3, 4, 5, 6, 8, 12, 16)))
        if is_held(text) == held:
            break
    times = rng.choices((1, 2, 3), (4, 1, 1))[0]
    if times > 1:
        return f"Repeat {('twice', 'three times')[times - 2]}: {text}", " ".join([text] * times)
    lead = rng.choices(("Repeat: ", "repeat: ", "Repeat after me: ", "Say: "), (4, 1, 2, 1))[0]
    return lead + text, text


def run_of_words(rng: Random, count: int) -> str:
    """`count` words, names, numbers or made-up strings, parted by spaces."""
    kind = rng.random()
    if kind < 0.5:
        words = [rng.choice(facts.WORDS) for _ in range(count)]
        if rng.random() < 0.2:
            words[rng.randrange(count)] = str(rng.randrange(1000))
        return " ".join(words)
    if kind < 0.65:
        return " ".join(rng.choice(TRAIN_NAMES + list(facts.CITIES)) for _ in range(count))
    if kind < 0.75:
        return " ".join(str(rng.randrange(100)) for _ in range(count))
    return " ".join(made_up(rng) for _ in range(count))


def counting(rng: Random, held: bool) -> tuple[str, str]:
    """Count up or down between two numbers; held out by the pair."""
    while True:
        start = 1 if rng.random() < 0.5 else rng.randrange(1, 60)
        end = start + rng.randrange(2, 21)
        down = rng.random() < 0.2
        if is_held(f"count {start} {end} {down}") == held:
            break
    numbers = [str(n) for n in range(start, end + 1)]
    if down:
        return f"Count down from {end} to {start}.", ", ".join(reversed(numbers))
    return rng.choice(("Count from {a} to {b}.", "Count from {a} to {b}")).format(a=start, b=end), ", ".join(numbers)


def listing(rng: Random, held: bool) -> tuple[str, str]:
    """Enumerate a well-known list."""
    names, words = rng.choice(
        (
            ("the days of the week", facts.WEEKDAYS),
            ("the months of the year", facts.MONTHS),
            ("the planets", facts.PLANETS),
            ("the seasons", facts.SEASONS),
            ("the colours of the rainbow", facts.RAINBOW),
            ("the letters of the alphabet", facts.ALPHABET),
        )
    )
    templates = ("List {n}.", "Name {n}.", "What are {n}?", "Give me a list of {n}.", "Tell me {n}.")
    return casual(rng, pick(rng, templates, held).format(n=names)), ", ".join(words)


GREETINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "hello", "Hi", "Hi!", "hi", "Hey", "Hey!", "Hi there", "Hello there!", "Hello, hi!"),
        "Hello! How can I help you?",
    ),
    (("Good morning!", "Good morning", "good morning", "Good morning to you!"), "Good morning! How can I help you?"),
    (("Good evening!", "Good evening", "good evening", "Good evening to you!"), "Good evening! How can I help you?"),
    (
        ("How are you?", "how are you", "How are you doing?", "How do you do?", "How are you today?"),
        "I am fine, thank you. How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "who are you", "Are you a model?", "Which model are you?", "Who is this?"),
        "I am Tandem's small demo model. I know a few facts, simple sums and JSON.",
    ),
    (
        ("What can you do?", "what can you do", "How can you help me?", "Help", "What do you know?"),
        "I can answer short questions, add small numbers, write JSON records and explain Tandem.",
    ),
    (
        ("What is your name?", "what is your name", "What's your name?", "Do you have a name?"),
        "I am Tandem's small demo model and have no other name.",
    ),
    (("What is my name?", "What's my name?", "Who am I?", "Can you tell me my name?"), "I do not know your name yet."),
    (
        ("Tell me a joke.", "Tell me a joke", "tell me a joke", "Do you know a joke?"),
        "Why did the page cross the wire? To get to the decode worker.",
    ),
    (("Thank you!", "Thanks!", "Thanks", "thank you", "Thanks a lot!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Bye", "bye", "See you later!"), "Goodbye!"),
)


def greeting(rng: Random, held: bool) -> tuple[str, str]:
    """Greetings, thanks and questions about the assistant."""
    templates, answer = rng.choice(GREETINGS[:1] * 3 + GREETINGS)
    return pick(rng, templates, held), answer


def story(rng: Random, held: bool) -> tuple[str, str]:
    """A short story about a named animal; its text follows from the name, the animal and the place."""
    name, beast = draw_name(rng, held), rng.choice(list(facts.SOUNDS))
    place = rng.choice(("forest", "garden", "valley", "village", "castle"))
    question = rng.choice(
        ("Tell me a story about {a} named {n} in a {p}.", "Write a story about {a} named {n} in a {p}.")
    )
    if not held and rng.random() < 0.2:
        name, beast, place = "Felix", "frog", "forest"
        question = rng.choice(("Tell me a story.", "Tell me a story", "Write a story.", "tell me a story"))
    text = (
        f"Once upon a time there was {article(beast)} named {name}. {name} lived in a quiet {place} and said "
        f"{facts.SOUNDS[beast]} every morning. One day {name} lost the way and asked the moon for help. The moon "
        f"shone over the {place}, and {name} the {beast} found the way home. The end."
    )
    return question.format(a=article(beast), n=name, p=place), text


def notes(rng: Random, held: bool) -> tuple[str, str]:
    """A question about one of several notes given in the prompt; held out by name."""
    people = rng.sample(HELD_NAMES if held else TRAIN_NAMES, rng.choice((1, 2, 2, 3, 4, 6)))
    cities = rng.sample(facts.CITIES, len(people))
    lines = " ".join(f"{name} lives in {city}." for name, city in zip(people, cities, strict=True))
    at = rng.randrange(len(people))
    return f"{lines} Where does {people[at]} live?", f"{people[at]} lives in {cities[at]}."


_UNKNOWN_TOPICS = (
    "the stock market",
    "football",
    "the weather tomorrow",
    "my neighbour",
    "quantum physics",
    "a good film",
    "the latest news",
    "cars",
    "the war",
    "my homework",
    "a recipe for cake",
    "politics",
    "the price of bread",
    "video games",
    "a holiday in the mountains",
    "love",
    "the meaning of life",
    "philosophy",
    "black holes",
    "wine",
    "my boss",
    "the best phone",
    "shoes",
    "the year 1848",
    "Roman history",
    "the law",
    "my dreams",
    "medicine",
)
UNKNOWN_ANSWER = "I am only a small demo model and I do not know that. Try a short question about a capital or a sum."


def unknown(rng: Random, held: bool) -> tuple[str, str]:
    """Questions outside the corpus, answered by saying so; held out by topic."""
    topic = rng.choice(split_entities(_UNKNOWN_TOPICS, held))
    question = rng.choice(
        (
            "What do you think about {t}?",
            "Write a poem about {t}.",
            "Can you help me with {t}?",
            "Why is {t} so hard?",
            "Tell me everything about {t}.",
            "Who invented {t}?",
            "What should I know about {t}?",
            "Give me advice on {t}.",
            "Write a python program about {t}.",
            "Summarise {t} for me.",
            "How does {t} work?",
            "Do you like {t}?",
        )
    )
    return casual(rng, question.format(t=topic)), UNKNOWN_ANSWER


FAMILIES: dict[str, tuple[Generator, float]] = {
    "capital": (capital, 1.6),
    "language": (language, 0.5),
    "element": (element, 1.0),
    "animal": (animal, 1.0),
    "colour": (colour, 0.6),
    "opposite": (opposite, 0.8),
    "general": (general, 0.6),
    "calendar": (calendar, 0.8),
    "arithmetic": (arithmetic, 3.5),
    "json": (json_record, 2.4),
    "tandem": (tandem, 2.0),
    "copy": (copy, 4.0),
    "counting": (counting, 0.7),
    "listing": (listing, 0.5),
    "greeting": (greeting, 1.0),
    "story": (story, 0.4),
    "notes": (notes, 1.4),
    "unknown": (unknown, 0.5),
}
"""Family name -> (generator, sampling weight)."""
