"""Wrong answers made from right ones, to see whether a checker notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from mlxkd.evaluation.toolcalls.bfcl.reader import FOREIGN, Case, as_source, gold_calls, gold_values
from mlxkd.evaluation.toolcalls.parsing import Call

Calls = list[Call]


def mutants(cases: Sequence[Case], count: int, seed: int = 0) -> Iterator[tuple[Case, str, Calls]]:
    """``count`` triples (case, kind of mutation, calls), the same for equal seed; needs cases with answers."""
    random = Random(seed)
    kinds = list(MUTATIONS)
    answered = [case for case in cases if case.answers]
    made = 0
    while made < count:
        case, kind = random.choice(answered), random.choice(kinds)
        # Values go wrong before they become source text, or the text itself does.
        early = case.category in FOREIGN and random.random() < 0.5
        calls = MUTATIONS[kind](copy.deepcopy(gold_values(case) if early else gold_calls(case)), random)
        if calls is not None and early:
            calls = [as_source(case, call) for call in calls]
        if calls is not None:
            made += 1
            yield case, kind, calls


def _wrong_name(calls: Calls, random: Random) -> Calls | None:
    i = random.randrange(len(calls))
    name = calls[i].name
    calls[i] = Call(
        random.choice([name + "s", name[:-1], name.replace(".", "_") + "_", name.upper() + "X"]), calls[i].arguments
    )
    return calls


def _missing(calls: Calls, random: Random) -> Calls | None:
    arguments = random.choice(calls).arguments
    if not arguments:
        return None
    del arguments[random.choice(list(arguments))]
    return calls


def _extra(calls: Calls, random: Random) -> Calls | None:
    random.choice(calls).arguments[random.choice(["verbose", "x", "unit_of_measure"])] = random.choice([1, "yes", None])
    return calls


def _wrong_type(calls: Calls, random: Random) -> Calls | None:
    return _replace(
        calls, random, lambda v: random.choice([t for t in (str(v), [v], {"value": v}, True, None) if t != v])
    )


def _wrong_value(calls: Calls, random: Random) -> Calls | None:
    return _replace(calls, random, lambda v: _other(v, random))


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + random.choice([1, -1, 10])
    if isinstance(value, str):
        return random.choice([value + "x", value[1:], "another"])
    if isinstance(value, list):
        return random.choice([value[:-1], value + value[:1], value[::-1], [_other(v, random) for v in value]])
    if isinstance(value, dict):
        return {k: _other(v, random) for k, v in value.items()}
    return 0


def _nested(calls: Calls, random: Random) -> Calls | None:
    def change(value: Any) -> Any:
        if isinstance(value, list) and value:
            index = random.randrange(len(value))
            return [
                change(v) if i == index and isinstance(v, dict | list) else _other(v, random) if i == index else v
                for i, v in enumerate(value)
            ]
        if isinstance(value, dict) and value:
            key = random.choice(list(value))
            rest = {k: v for k, v in value.items() if k != key}
            return random.choice([rest, {**value, key: _other(value[key], random)}, {**value, "more": 1}])
        return value

    if not any(isinstance(v, list | dict) and v for c in calls for v in c.arguments.values()):
        return None
    return _replace(calls, random, change, kinds=(list, dict))


def _reordered_arguments(calls: Calls, random: Random) -> Calls | None:
    return [Call(c.name, dict(random.sample(list(c.arguments.items()), len(c.arguments)))) for c in calls]


def _reordered_calls(calls: Calls, random: Random) -> Calls | None:
    return random.sample(calls, len(calls)) if len(calls) > 1 else None


def _dropped(calls: Calls, random: Random) -> Calls | None:
    del calls[random.randrange(len(calls))]
    return calls


def _repeated(calls: Calls, random: Random) -> Calls | None:
    return [*calls, random.choice(calls)]


def _respelled(calls: Calls, random: Random) -> Calls | None:
    change = random.choice([str.upper, str.title, lambda s: s.replace(" ", "-"), lambda s: f" {s}.", lambda s: s + "'"])
    return _replace(calls, random, change, kinds=(str,))


def _as_float(calls: Calls, random: Random) -> Calls | None:
    return _replace(calls, random, float, kinds=(int,))


def _as_text(calls: Calls, random: Random) -> Calls | None:
    return _replace(calls, random, str, kinds=(int, float, bool))


def _misspelt(calls: Calls, random: Random) -> Calls | None:
    def change(text: str) -> str:
        at = random.randrange(len(text) + 1)
        return random.choice([text[:at] + text[at + 1 :], text[:at] + random.choice("\"',{}[]() 1Lfn") + text[at:]])

    return _replace(calls, random, change, kinds=(str,))


def _replace(
    calls: Calls, random: Random, change: Callable[[Any], Any], kinds: tuple[type, ...] = (object,)
) -> Calls | None:
    places = [(c, k) for c in calls for k, v in c.arguments.items() if isinstance(v, kinds)]
    if not places:
        return None
    call, key = random.choice(places)
    call.arguments[key] = change(call.arguments[key])
    return calls


MUTATIONS: dict[str, Callable[[Calls, Random], Calls | None]] = {
    "wrong_name": _wrong_name,
    "missing": _missing,
    "extra": _extra,
    "wrong_type": _wrong_type,
    "wrong_value": _wrong_value,
    "nested": _nested,
    "reordered_arguments": _reordered_arguments,
    "reordered_calls": _reordered_calls,
    "dropped": _dropped,
    "repeated": _repeated,
    "respelled": _respelled,
    "as_float": _as_float,
    "as_text": _as_text,
    "misspelt": _misspelt,
}
