"""Facts that an answer takes from tool results: where they stand, which are missing, which are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mlxkd.evaluation.toolcalls.locales import Locale, dates, numbers

TOOL_ROLES = ("tool", "function", "ipython")
Leaf = str | int | float


@dataclass(frozen=True)
class EvidenceScore:
    """Copied facts of one answer.

    Args:
        expected: facts of the tool results that the reference answer mentions.
        correct: of those, how many the generated answer mentions.
        copied: facts of the tool results that the generated answer mentions.
        invented: numbers and dates in it that stand nowhere in the conversation.
    """

    expected: int
    correct: int
    copied: int
    invented: int

    @property
    def precision(self) -> float | None:
        """Correct over everything stated as a fact; None when nothing is."""
        stated = self.copied + self.invented
        return self.correct / stated if stated else None

    @property
    def recall(self) -> float | None:
        """Correct over expected; None when nothing is expected."""
        return self.correct / self.expected if self.expected else None


def score_evidence(
    messages: Sequence[dict[str, Any]], reference: str, generated: str, locale: Locale | None = None
) -> EvidenceScore:
    """Judge the facts of an answer.

    Args:
        messages: the conversation before the answer, tool results included.
        reference, generated: the expected and the generated answer.
        locale: how numbers and dates are written in them; None accepts any.
    """
    facts = tool_facts(messages)
    expected = {i for i, fact in enumerate(facts) if mentions(fact, reference, locale)}
    copied = {i for i, fact in enumerate(facts) if mentions(fact, generated, locale)}
    known = " \n ".join([*(_content(m) for m in messages), *(str(f) for f in facts)])
    return EvidenceScore(len(expected), len(expected & copied), len(copied), _invented(generated, known, locale))


def _invented(generated: str, known: str, locale: Locale | None) -> int:
    said_dates = list(dates(generated, locale))
    known_values: set[object] = {r for _, _, found in numbers(known) for r in found}
    known_values |= {r for _, _, days in dates(known) for r in days}
    said: list[set[object]] = [set(days) for _, _, days in said_dates]
    said += [
        set(found)
        for start, end, found in numbers(generated, locale)
        if not any(s <= start and end <= e for s, e, _ in said_dates)
    ]
    return sum(not (found & known_values) for found in said)


def tool_facts(messages: Iterable[dict[str, Any]]) -> list[Leaf]:
    """Leaf values of all tool results, without repeats; true, false and null are no facts to copy."""
    facts: list[Leaf] = []
    for message in messages:
        if message["role"] in TOOL_ROLES:
            text = _content(message)
            try:
                found = list(_leaves(json.loads(text)))
            except json.JSONDecodeError:
                found = [text.strip(), *(text[s:e] for s, e, _ in numbers(text))]
            facts += [fact for fact in found if fact not in facts and str(fact).strip()]
    return facts


def _leaves(value: Any) -> Iterable[Leaf]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value


def mentions(fact: Leaf, text: str, locale: Locale | None = None) -> list[tuple[int, int]]:
    """Character ranges of a text that state a fact: the same number or date in any spelling, the same words."""
    if isinstance(fact, int | float):
        return [(s, e) for s, e, found in numbers(text, locale) if Decimal(str(fact)) in found]
    words = r"(?<!\w)" + re.escape(fact.strip()) + r"(?!\w)"
    ranges = [match.span() for match in re.finditer(words, text, re.IGNORECASE)]
    whole = [found for s, e, found in dates(fact) if (s, e) == (0, len(fact))]
    if whole:
        ranges += [(s, e) for s, e, found in dates(text, locale) if found & whole[0] and (s, e) not in ranges]
    return ranges


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""
