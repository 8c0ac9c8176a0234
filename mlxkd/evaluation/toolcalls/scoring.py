"""Is what the model wrote the call that was expected?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkd.evaluation.toolcalls import schema
from mlxkd.evaluation.toolcalls.parsing import Call, Parser
from mlxkd.metric import Metric


@dataclass(frozen=True)
class CallScore:
    """One answer, judged.

    Args:
        exact: the calls asked for and nothing else (order aside): names and arguments equal as JSON values. Where
            no call was asked for: none was attempted.
        name_ok: the right tools were named, each as often as asked.
        arguments_ok: name_ok, and their arguments equal.
        schema_valid: every call parses and satisfies the schema of its tool (False when there is none).
        called: a call was attempted, even a broken one.
        should_call: the expected answer calls a tool.
        expected, made: number of calls asked for, and of readable calls made.
        fault: what was wrong with the first bad call, for people.
    """

    exact: bool
    name_ok: bool
    arguments_ok: bool
    schema_valid: bool
    called: bool
    should_call: bool
    expected: int = 0
    made: int = 0
    fault: str | None = None


def score(
    expected_messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], generated_text: str, parser: Parser
) -> CallScore:
    """Judge one generated answer.

    Args:
        expected_messages: a conversation whose last message is the assistant's expected answer.
        tools: the tools on offer.
        generated_text: what the model wrote, special tokens of its calls included.
        parser: of the tokenizer's call format, from ``parser_for``.
    """
    wanted = expected_calls(expected_messages[-1])
    found, pending = parser.read(generated_text, tools)
    made = [call for item in found for call in item.calls]
    faults = [item.fault for item in found if item.fault]
    if pending is not None:
        faults.append("a call was opened and never completed")
    invalid = [reason for call in made if (reason := schema.fault(call, tools)) is not None]
    attempted = bool(found) or pending is not None
    clean = not faults
    name_ok = clean and sorted(c.name for c in made) == sorted(c.name for c in wanted)
    arguments_ok = name_ok and same_calls(made, wanted)
    return CallScore(
        exact=arguments_ok if wanted else not attempted,
        name_ok=name_ok if wanted else not attempted,
        arguments_ok=arguments_ok if wanted else not attempted,
        schema_valid=bool(made) and clean and not invalid,
        called=attempted,
        should_call=bool(wanted),
        expected=len(wanted),
        made=len(made),
        fault=next(iter([*faults, *invalid]), None),
    )


def expected_calls(message: dict[str, Any]) -> list[Call]:
    """The calls of an assistant message in the OpenAI form."""
    return [Call(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]


def same_calls(made: Sequence[Call], wanted: Sequence[Call]) -> bool:
    """Equal as a collection: parallel calls may come in any order."""
    left = list(wanted)
    for call in made:
        match = next((w for w in left if w.name == call.name and same_json(w.arguments, call.arguments)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, but true does not equal 1; members of objects have no order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and a == b


def aggregate(scores: Iterable[CallScore], device: str) -> dict[str, Metric]:
    """Shares over many answers.

    Keys: ``exact`` (all answers), ``exact_calls``, ``name``, ``arguments``, ``schema_valid`` (answers that should
    call), ``false_calls`` (answers that should not), ``missed_calls`` and ``several`` (exactness where more than
    one call was asked for). A share over nothing is missing, with the reason.
    """
    items = list(scores)
    calls = [s for s in items if s.should_call]
    others = [s for s in items if not s.should_call]
    return {
        "exact": _share([s.exact for s in items], device, "no answers"),
        "exact_calls": _share([s.exact for s in calls], device, "no answer should call a tool"),
        "name": _share([s.name_ok for s in calls], device, "no answer should call a tool"),
        "arguments": _share([s.arguments_ok for s in calls], device, "no answer should call a tool"),
        "schema_valid": _share([s.schema_valid for s in calls], device, "no answer should call a tool"),
        "missed_calls": _share([not s.called for s in calls], device, "no answer should call a tool"),
        "false_calls": _share([s.called for s in others], device, "every answer should call a tool"),
        "several": _share([s.exact for s in calls if s.expected > 1], device, "no answer has several calls"),
    }


def _share(hits: list[bool], device: str, empty: str) -> Metric:
    if not hits:
        return Metric(None, "share", "measured", device, n=0, note=empty)
    return Metric(sum(hits) / len(hits), "share", "measured", device, n=len(hits))
