"""Values that requests mention and calls must copy, by kind, with an unseen part for held-out sets."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable

from mlxkd.demo import words

Value = str | int | float | bool | list[str]


INVENTED_SHARE = 0.3


def invented(rng: random.Random, unseen: bool) -> str:
    """A word that exists nowhere, so that it can only be copied.

    Held-out words are made of syllables; training also meets words spelled like real ones, which the tokenizer cuts
    in all the ways that it cuts a real word it has no piece for.
    """
    if not unseen and rng.random() < 0.5:
        return _spelled(rng)
    return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(words.ENDINGS)


def _spelled(rng: random.Random) -> str:
    """A word of 4 to 10 letters, not a listed one, in which any three neighbours stand together in a training word."""
    following, starts, listed = _spelling()
    while True:
        word = rng.choice(starts)
        while len(word) < 10 and (letter := rng.choice(following[word[-2:]])):
            word += letter
        if len(word) >= 4 and word not in listed:
            return word


@functools.cache
def _spelling() -> tuple[dict[str, list[str]], list[str], frozenset[str]]:
    """Letters that follow each two letters ("" at the end of a word), the two that words start with, all words."""
    lists = {"name": words.NAMES, "place": words.PLACES, "thing": words.THINGS, "topic": words.TOPIC_WORDS}
    seen = [word.lower() for salt, listed in lists.items() for word in words.pool(listed, salt=salt, unseen=False)]
    following: dict[str, list[str]] = defaultdict(list)
    for word in seen:
        for i in range(len(word) - 1):
            following[word[i : i + 2]].append(word[i + 2 : i + 3])
    return following, [word[:2] for word in seen], frozenset(w.lower() for listed in lists.values() for w in listed)


def _pick(rng: random.Random, listed: list[str], salt: str, unseen: bool) -> str:
    if rng.random() < INVENTED_SHARE:
        return invented(rng, unseen).capitalize()
    return rng.choice(words.pool(listed, salt=salt, unseen=unseen))


def person(rng: random.Random, unseen: bool) -> str:
    return _pick(rng, words.NAMES, "name", unseen)


def place(rng: random.Random, unseen: bool) -> str:
    return _pick(rng, words.PLACES, "place", unseen)


def thing(rng: random.Random, unseen: bool) -> str:
    listed = words.pool(words.THINGS, salt="thing", unseen=unseen)
    return invented(rng, unseen) if rng.random() < INVENTED_SHARE else rng.choice(listed)


def topic(rng: random.Random, unseen: bool) -> str:
    """A title of one to three words."""
    listed = words.pool(words.TOPIC_WORDS, salt="topic", unseen=unseen)
    count = rng.randint(1, 3)
    parts = [invented(rng, unseen) if rng.random() < INVENTED_SHARE else rng.choice(listed) for _ in range(count)]
    return " ".join(dict.fromkeys(parts))


def task(rng: random.Random, unseen: bool) -> str:
    """Something to do, such as "call Ana" or "water the plants"."""
    verb = rng.choice(words.TASK_VERBS)
    if rng.random() < 0.4:
        return f"{verb} {person(rng, unseen)}"
    if not unseen and rng.random() < INVENTED_SHARE:
        return f"{verb} the {invented(rng, unseen)}"
    return f"{verb} {rng.choice(words.pool(words.TASK_OBJECTS, salt='object', unseen=unseen))}"


def day(rng: random.Random, unseen: bool) -> str:
    return rng.choice(words.DAYS)


def time(rng: random.Random, unseen: bool) -> str:
    hour = rng.randint(1, 23)
    form = rng.random()
    if form < 0.35:
        return str(rng.randint(1, 12))
    if form < 0.75:
        return f"{hour}:{rng.randint(0, 59):02d}"
    return rng.choice([f"{rng.randint(1, 12)} pm", f"{rng.randint(1, 12)} am", "noon", "midnight"])


def code(rng: random.Random, unseen: bool) -> str:
    """An identifier such as "K482" or "7-193"."""
    number = rng.randint(10, 9999)
    return rng.choice(
        [f"{rng.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}{number}", f"{rng.randint(1, 9)}-{number}", str(number)]
    )


def small_integer(rng: random.Random, unseen: bool) -> int:
    return rng.randint(1, 12)


def integer(rng: random.Random, unseen: bool) -> int:
    return rng.randint(2, 10 ** rng.randint(1, 4))


def decimal(rng: random.Random, unseen: bool) -> float:
    """A number with one or two decimals, never a whole one, as it is written in the request."""
    return float(
        f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{rng.choice(['5', '25', '75', '1', '2', '3', '4', '6', '9'])}"
    )


def things(rng: random.Random, unseen: bool) -> list[str]:
    return list(dict.fromkeys(thing(rng, unseen) for _ in range(rng.randint(2, 4))))


def people(rng: random.Random, unseen: bool) -> list[str]:
    return list(dict.fromkeys(person(rng, unseen) for _ in range(rng.randint(2, 3))))


def truth(rng: random.Random, unseen: bool) -> bool:
    return rng.random() < 0.6


GENERATORS: dict[str, Callable[[random.Random, bool], Value]] = {
    "person": person,
    "place": place,
    "thing": thing,
    "topic": topic,
    "task": task,
    "day": day,
    "time": time,
    "code": code,
    "small": small_integer,
    "integer": integer,
    "decimal": decimal,
    "things": things,
    "people": people,
    "truth": truth,
    "color": lambda rng, unseen: rng.choice(words.COLORS),
    "language": lambda rng, unseen: rng.choice(words.LANGUAGES),
}

STRINGS = ("person", "place", "thing", "topic", "task", "day", "time", "code", "color", "language")
JSON_TYPES = {
    **dict.fromkeys(STRINGS, "string"),
    "small": "integer",
    "integer": "integer",
    "decimal": "number",
    "things": "array",
    "people": "array",
    "truth": "boolean",
}


def spoken(value: Value) -> str:
    """The value as a request says it: lists with commas and a final "and"."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)
