"""BFCL's abstract-syntax-tree rules, quirks included.

Specification: ``bfcl_eval/eval_checker/ast_eval/ast_checker.py`` of bfcl-eval 2026.3.23; the tests compare
verdicts with that checker on every gold answer and on tens of thousands of mutants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlxkd.evaluation.toolcalls.bfcl import literals
from mlxkd.evaluation.toolcalls.bfcl.categories import language
from mlxkd.evaluation.toolcalls.parsing import Call

TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
TYPES_OF = {"python": TYPES, **literals.TYPES}
NESTED = ("array", "tuple", "Array", "ArrayList")
OMITTED = ""
_IGNORED = re.compile(r"[ ,./\-_*^]")


def fault(
    category: str, functions: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], calls: Sequence[Call]
) -> str | None:
    """Why the calls do not match the possible answers; None when they do.

    Args:
        category: e.g. "simple_python", "parallel_multiple".
        functions: the case's functions with BFCL's own types.
        answers: ``[{name: {parameter: [allowed, ...]}}]``; ``""`` among the allowed means it may be left out.
        calls: what the model made.
    """
    if len(calls) != len(answers):
        return f"{len(calls)} calls instead of {len(answers)}"
    if "parallel" in category:
        return _in_any_order(functions, answers, calls)
    function = _described(functions, answers[0]) if "multiple" in category else functions[0]
    return call_fault(function, answers[0], calls[0], language(category))


def _described(functions: Sequence[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    return next(f for f in functions if f["name"] in answer)


def _in_any_order(
    functions: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], calls: Sequence[Call]
) -> str | None:
    # Greedy, like the leaderboard: the first call that fits an answer is taken, without backtracking.
    left = list(calls)
    for answer in answers:
        function = _described(functions, answer)
        reasons = [call_fault(function, answer, call) for call in left]
        if None not in reasons:
            return f"no call matches {next(iter(answer))}: {reasons[0]}"
        del left[reasons.index(None)]
    return None


def call_fault(function: dict[str, Any], answer: dict[str, Any], call: Call, language: str = "python") -> str | None:
    """Why one call does not match one possible answer of its function; None when it does.

    Arguments of Java and JavaScript functions are strings of source text.
    """
    allowed: dict[str, list[Any]] = next(iter(answer.values()))
    parameters = function["parameters"]
    if call.name != function["name"]:
        return f"function {call.name!r} instead of {function['name']!r}"
    for name in parameters.get("required", ()):
        if name not in call.arguments:
            return f"required parameter {name!r} is missing"
    for name, value in call.arguments.items():
        if name not in parameters["properties"] or name not in allowed:
            return f"unexpected parameter {name!r}"
        reason = _argument_fault(parameters["properties"][name], allowed[name], value, language)
        if reason:
            return f"parameter {name!r}: {reason}"
    for name, values in allowed.items():
        if name not in call.arguments and OMITTED not in values:
            return f"parameter {name!r} may not be left out"
    return None


def _argument_fault(schema: dict[str, Any], allowed: list[Any], argument: Any, language: str) -> str | None:
    declared, types = schema["type"], TYPES_OF[language]
    if declared not in types:
        return f"values of type {declared} cannot be judged"
    item = schema["items"]["type"] if declared in NESTED and declared in types else None
    expected, inner = types[declared], types[item] if item else None
    value: Any = argument
    if language != "python":
        if not isinstance(argument, str):
            return f"{type(argument).__name__} instead of {language} source"
        value = literals.READ[language](argument, declared, item)
    elif declared == "float" and type(argument) is int:
        value = float(argument)
    as_variable = _type_of(allowed) not in (None, expected)
    if type(value) is not expected:
        # A variable (or another type on purpose): what the possible answers hold counts as the type.
        if type(value) is not _type_of(allowed):
            return f"{type(value).__name__} instead of {declared}"
        as_variable = True
    elif isinstance(value, list) and inner and not any(_items_fit(value, choice, inner) for choice in allowed):
        return f"elements are not of type {schema['items']['type']}"
    if as_variable:
        return None if value in allowed else f"{value!r} is none of {allowed}"
    return _value_fault(expected, inner, allowed, value)


def _type_of(allowed: Sequence[Any]) -> type | None:
    return next((type(choice) for choice in allowed if choice != OMITTED), None)


def _items_fit(value: list[Any], choice: Any, inner: type) -> bool:
    # Types are checked one level deep, and a choice that is no list (the mark for "left out") accepts anything.
    return not isinstance(choice, list) or all(type(item) in (inner, _type_of(choice)) for item in value)


def _value_fault(expected: type, inner: type | None, allowed: list[Any], value: Any) -> str | None:
    if expected is dict:
        fits = any(_dict_fits(value, choice) for choice in allowed if choice != OMITTED)
    elif expected is list and inner is dict:
        fits = any(_dicts_fit(value, choice) for choice in allowed)
    elif expected is str:
        fits = _plain(value) in [_plain(choice) for choice in allowed if isinstance(choice, str)]
    elif expected is list:
        fits = [_plain(item) for item in value] in [[_plain(item) for item in choice] for choice in allowed]
    else:
        fits = value in allowed
    return None if fits else f"{value!r} is none of {allowed}"


def _dicts_fit(value: list[Any], choice: Any) -> bool:
    return len(value) == len(choice) and all(
        c != OMITTED and _dict_fits(v, c) for v, c in zip(value, choice, strict=True)
    )


def _dict_fits(value: Any, choice: dict[str, list[Any]]) -> bool:
    if not isinstance(value, dict) or any(key not in choice for key in value):
        return False
    return all(
        _plain(value[key]) in [_plain(item) for item in values] if key in value else OMITTED in values
        for key, values in choice.items()
    )


def _plain(value: Any) -> Any:
    """Strings without spaces, punctuation, case and kind of quotes; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
