"""Single-turn categories of BFCL v4 and how their accuracies add up."""

from __future__ import annotations

from collections.abc import Mapping

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = ("multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
IRRELEVANCE = ("irrelevance", "live_irrelevance")
RELEVANCE = ("live_relevance",)
CATEGORIES = (*SIMPLE, *NON_LIVE, *LIVE, *IRRELEVANCE, *RELEVANCE)


def should_call(category: str) -> bool:
    """Whether an answer of this category calls a tool."""
    return category not in IRRELEVANCE


def language(category: str) -> str:
    """ "python", "java" or "javascript": in which language the functions of a category are."""
    return category.removeprefix("simple_") if category in SIMPLE else "python"


def overall(accuracy: Mapping[str, float], count: Mapping[str, int]) -> dict[str, float]:
    """The leaderboard's averages over the categories that were run.

    ``non_live`` is the plain mean of simple (itself the mean of its languages), multiple, parallel and
    parallel_multiple; ``live`` weights its categories by their cases. ``irrelevance`` is their plain mean; a model
    that never calls anything gets 1 there, so read it beside the others (gorilla#443).
    """
    simple = [accuracy[c] for c in SIMPLE if c in accuracy]
    non_live = [*([_mean(simple)] if simple else []), *(accuracy[c] for c in NON_LIVE if c in accuracy)]
    live = [c for c in LIVE if c in accuracy]
    irrelevance = [accuracy[c] for c in IRRELEVANCE if c in accuracy]
    out = {}
    if non_live:
        out["non_live"] = _mean(non_live)
    if live:
        out["live"] = sum(accuracy[c] * count[c] for c in live) / sum(count[c] for c in live)
    if irrelevance:
        out["irrelevance"] = _mean(irrelevance)
    return out


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
