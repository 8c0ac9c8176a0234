"""One generated answer under BFCL's rules, and the leaderboard's averages over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxkd.evaluation.toolcalls.bfcl import rules
from mlxkd.evaluation.toolcalls.bfcl.categories import IRRELEVANCE, RELEVANCE, overall
from mlxkd.evaluation.toolcalls.bfcl.reader import Case
from mlxkd.evaluation.toolcalls.parsing import Parser
from mlxkd.metric import Metric


def fault(case: Case, text: str, parser: Parser) -> str | None:
    """Why an answer does not pass; None when it does.

    Irrelevance passes where no call can be read, broken ones included, as on the leaderboard; relevance where one can.
    """
    found, pending = parser.read(text, case.tools)
    calls = [call for item in found for call in item.calls]
    if case.category in IRRELEVANCE:
        return f"{len(calls)} calls where none belongs" if calls else None
    if case.category in RELEVANCE:
        return None if calls else "no call where one belongs"
    broken = next((item.fault for item in found if item.fault), None)
    if broken or pending is not None:
        return broken or "a call was opened and never completed"
    return rules.fault(case.category, case.functions, case.answers, calls)


def accuracies(verdicts: Mapping[str, Sequence[bool]], device: str) -> dict[str, Metric]:
    """Accuracy of each category (keys ``category/accuracy``) and the leaderboard's averages (``non_live``, ...)."""
    found = {
        f"{category}/accuracy": Metric(sum(passed) / len(passed), "share", "measured", device, n=len(passed))
        for category, passed in verdicts.items()
    }
    accuracy = {category: sum(passed) / len(passed) for category, passed in verdicts.items()}
    count = {category: len(passed) for category, passed in verdicts.items()}
    for name, value in overall(accuracy, count).items():
        note = "a model that never calls scores 1 here: read it beside the others" if name == "irrelevance" else None
        found[name] = Metric(value, "share", "measured", device, n=sum(count.values()), note=note)
    return found
