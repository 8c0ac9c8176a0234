"""Tools composed anew from words: names, parameters, types and descriptions that differ every time.

A model cannot remember them; it has to read the schema in the prompt. Three circles of novelty:
combinations used in training, combinations of known words that training never uses, and words that
training never sees.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from mlxkd.demo import words
from mlxkd.demo.tools import DemoTool, Param
from mlxkd.demo.values import INVENTED_SHARE, JSON_TYPES, Value, invented, spoken

Novelty = Literal["train", "composed", "words"]

# Parameter name -> the kinds it may take and the ways a request says it: the last one is held out, a new combination
# of words that training uses.
PARAMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": (("topic", "person"), ("called {}", "named {}", "with the name {}", "that is called {}")),
    "title": (("topic",), ("titled {}", "with the title {}", "entitled {}", "that is titled {}")),
    "owner": (("person",), ("owned by {}", "that belongs to {}", "of {}", "that is owned by {}")),
    "recipient": (("person",), ("for {}", "to {}", "addressed to {}", "and it is for {}")),
    "author": (("person",), ("by {}", "written by {}", "from the author {}", "that is written by {}")),
    "city": (("place",), ("in {}", "located in {}", "at {}", "that is located in {}")),
    "origin": (("place",), ("from {}", "starting in {}", "leaving {}", "starting from {}")),
    "destination": (("place",), ("to {}", "going to {}", "bound for {}", "and going to {}")),
    "region": (("place",), ("in the region {}", "around {}", "near {}", "around the region {}")),
    "color": (("color",), ("in {}", "colored {}", "with the color {}", "in the color {}")),
    "language": (("language",), ("in {}", "written in {}", "in the language {}", "written in the language {}")),
    "material": (("thing",), ("made of {}", "out of {}", "built of {}", "that is made of {}")),
    "topic": (("topic",), ("about {}", "on {}", "concerning {}", "that is about {}")),
    "comment": (("task",), ("with the comment {}", "saying {}", "and write {}", "with a comment saying {}")),
    "reason": (("task",), ("because I must {}", "so that I can {}", "in order to {}", "because I want to {}")),
    "day": (("day",), ("on {}", "for {}", "this {}", "and on {}")),
    "time": (("time",), ("at {}", "around {}", "by {}", "and at {}")),
    "code": (("code",), ("with code {}", "code {}", "using the code {}", "with the code {}")),
    "number": (("code", "integer"), ("number {}", "with number {}", "with the number {}", "using the number {}")),
    "count": (("small", "integer"), ("{} times", "with a count of {}", "count {}", "and {} times")),
    "quantity": (("small", "integer"), ("{} pieces", "in a quantity of {}", "{} units of it", "with {} pieces")),
    "minutes": (("integer",), ("for {} minutes", "lasting {} minutes", "{} minutes long", "and lasting {} minutes")),
    "pages": (("integer",), ("with {} pages", "{} pages long", "of {} pages", "that is {} pages long")),
    "people": (("small",), ("for {} people", "with {} people", "and we are {} people", "and for {} people")),
    "price": (
        ("decimal", "integer"),
        ("for {} dollars", "at a price of {}", "costing {}", "with a price of {} dollars"),
    ),
    "weight": (("decimal",), ("weighing {} kilos", "of {} kilos", "with a weight of {}", "with a weight of {} kilos")),
    "distance": (("decimal",), ("within {} km", "at a distance of {}", "{} km away", "at {} km")),
    "speed": (("integer", "decimal"), ("at speed {}", "with a speed of {}", "going {} fast", "at a speed of {}")),
    "items": (("things",), ("with {}", "containing {}", "including {}", "and containing {}")),
    "guests": (("people",), ("with {}", "inviting {}", "together with {}", "and inviting {}")),
    "tags": (("things",), ("tagged {}", "with the tags {}", "under the tags {}", "tagged with {}")),
    "urgent": (("truth",), ("urgently", "as urgent", "with urgency", "and urgently")),
    "private": (("truth",), ("privately", "as private", "in private mode", "and privately")),
    "express": (("truth",), ("by express", "with express service", "express", "and by express")),
    "silent": (("truth",), ("silently", "without a sound", "in silent mode", "and silently")),
    "size": (("small|medium|large",), ("in size {}", "of {} size", "size {}", "with {} size")),
    "priority": (("low|normal|high",), ("with {} priority", "priority {}", "at {} priority", "in {} priority")),
    "format": (("short|long|full",), ("in {} format", "as {} format", "in the {} form", "in the {} format")),
    "quality": (("basic|good|best",), ("in {} quality", "of {} quality", "with {} quality", "in the {} quality")),
    "frequency": (("daily|weekly|monthly",), ("{}", "repeating {}", "on a {} basis", "and repeating {}")),
    "direction": (("north|south|east|west",), ("to the {}", "heading {}", "facing {}", "heading to the {}")),
    "level": (("beginner|expert|master",), ("at {} level", "for a {}", "of {} level", "at the {} level")),
    "category": (("sports|music|news|art",), ("in the category {}", "from {}", "about {}", "from the category {}")),
    "status": (("open|closed|pending",), ("that is {}", "with status {}", "marked {}", "and with status {}")),
}
# Ways to name a parameter outright: the last one is held out.
GENERIC = (
    "with {p} {v}",
    "{p} {v}",
    "with the {p} {v}",
    "and set {p} to {v}",
    "where {p} is {v}",
    "using {v} as {p}",
    "with {v} as the {p}",
    "and make the {p} {v}",
    "taking {v} as the {p}",
    "using {v} as the {p}",
)
GENERIC_FLAGS = ("with {p} on", "and turn {p} on", "{p} yes", "make it {p}", "and switch {p} on", "and turn the {p} on")
GENERIC_UNFLAGS = (
    "with {p} off",
    "and turn {p} off",
    "{p} no",
    "not {p}",
    "and switch {p} off",
    "and turn the {p} off",
)
OPENERS = (
    "{} ",
    "please {} ",
    "can you {} ",
    "I want to {} ",
    "could you {} ",
    "I need to {} ",
    "help me {} ",
    "I would like to {} ",
    "please help me {} ",
)
DETERMINERS = ("the", "a", "my", "this", "that")
DESCRIPTIONS = ("{V} a {n}", "{V} the {n}", "{V} {n}", "{V} one {n}")
SALT = "composed"


@dataclass(frozen=True)
class ComposedTool(DemoTool):
    """A tool made from a verb, a noun and parameters, which can phrase requests for itself."""

    verb: str = ""
    noun: str = ""

    def request(self, rng: random.Random, *, unseen: bool) -> tuple[str, dict[str, Value]]:
        phrasings = words.VERBS.get(self.verb, (self.verb,))
        action = rng.choice(phrasings)
        opener = OPENERS[-1] if unseen and rng.random() < 0.5 else rng.choice(OPENERS[:-1])
        said: list[str] = []
        values: dict[str, Value] = {}
        for param in self.params:
            if not param.required and rng.random() < 0.5:
                continue
            value = param.sample(rng, unseen)
            while any(v == value and isinstance(v, str) for v in values.values()):
                value = param.sample(rng, unseen)
            said.append(_phrase(param, value, rng, unseen))
            values[param.name] = value
        rng.shuffle(said)
        return f"{opener.format(action)}{rng.choice(DETERMINERS)} {self.noun} {' '.join(said)}".strip(), values


def _phrase(param: Param, value: Value, rng: random.Random, unseen: bool) -> str:
    name = param.name.replace("_", " ")
    own = PARAMS.get(param.name, ((), ()))[1]
    if isinstance(value, bool):
        generic: tuple[str, ...] = GENERIC_FLAGS if value else GENERIC_UNFLAGS
        own = own if value else ()
    else:
        generic = GENERIC
    patterns = generic if not own or rng.random() < 0.3 else own
    pattern = patterns[-1] if unseen and rng.random() < 0.5 else rng.choice(patterns[:-1] or patterns)
    return pattern.replace("{p}", name).replace("{v}", spoken(value)).replace("{}", spoken(value))


def _split(listed: list[str], novelty: Novelty, share: float) -> list[str]:
    return words.pool(listed, salt=SALT, unseen=novelty == "words", share=share)


def compose(rng: random.Random, novelty: Novelty = "train") -> ComposedTool:
    """Make a tool.

    Args:
        rng: source of randomness.
        novelty: "train" and "composed" use the same words in disjoint verb-noun pairs; "words" takes
            verbs, nouns and parameter names that training never sees.
    """
    verbs, nouns = _split(list(words.VERBS), novelty, 0.12), _split(words.NOUNS, novelty, 0.12)
    while True:
        verb, noun = rng.choice(verbs), _noun(rng, nouns, novelty)
        if novelty == "words" or words.held_out(f"{verb}_{noun}", salt=SALT, share=0.1) == (novelty == "composed"):
            break
    known = _split(list(PARAMS), novelty if novelty == "words" else "train", 0.15)
    names = _tell_apart(rng.sample(known, rng.choice((1, 1, 2, 2, 2, 3, 3, 4))))
    params = {p.name: p for p in (_param(name, rng, novelty) for name in names)}
    description = rng.choice(DESCRIPTIONS).format(V=verb.capitalize(), n=noun)
    return ComposedTool(f"{verb}_{noun}", description, tuple(params.values()), verb=verb, noun=noun)


def _noun(rng: random.Random, nouns: list[str], novelty: Novelty) -> str:
    """A noun; in training often an invented one, which can only be copied from the schema."""
    return invented(rng, False) if novelty == "train" and rng.random() < INVENTED_SHARE else rng.choice(nouns)


def _tell_apart(names: list[str]) -> list[str]:
    """Without the names that a request would say like an earlier one ("to Ana", "to Paris")."""
    said: set[str] = set()
    kept: list[str] = []
    for name in names:
        if said.isdisjoint(PARAMS[name][1]):
            said.update(PARAMS[name][1])
            kept.append(name)
    return kept


def _param(name: str, rng: random.Random, novelty: Novelty) -> Param:
    required = rng.random() < 0.7
    if rng.random() < 0.2:
        # The name is any noun and the kind any kind: only the schema tells.
        noun = _noun(rng, _split(words.NOUNS, novelty, 0.12), novelty)
        return Param(noun, rng.choice(list(JSON_TYPES)), required)
    kind = rng.choice(PARAMS[name][0])
    return Param(name, tuple(kind.split("|")) if "|" in kind else kind, required)
