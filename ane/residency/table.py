"""What a rule is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ane.residency.chips import Chip
from ane.residency.program import Function, Op
from mlxkd.registry import listing, member

Verdict = Literal["NE", "CPU", "FAIL", "BAD", "SLOW", "NOTE"]
Confidence = Literal["high", "medium", "low"]
LEAVES = ("CPU", "FAIL", "BAD")  # verdicts that take an operation off the Neural Engine
SEVERITY = {"FAIL": 0, "BAD": 1, "CPU": 2, "SLOW": 3, "NOTE": 4, "NE": 5}


@dataclass(frozen=True)
class Scene:
    """What a rule may look at beside the operation itself."""

    function: Function
    chip: Chip


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Args:
        id: "R7"; numbers are those of the project's list of facts.
        verdict: NE runs there; CPU falls off; FAIL does not compile or load; BAD gives wrong numbers; SLOW stays
            but costs; NOTE is worth knowing.
        confidence: high with a vendor's statement or several independent measurements, medium with one good
            source, low with a single report or contradicting ones.
        source: where it is written.
        fix: what change would move it.
        check: (op, scene) -> the reason in words, or None; for a rule about a whole function, the first argument
            is None.
        whole: the rule speaks about a function, not an operation.
    """

    id: str
    verdict: Verdict
    confidence: Confidence
    source: str
    fix: str
    check: Callable[..., str | None]
    whole: bool = False


def rule(id: str, verdict: Verdict, confidence: Confidence, source: str, fix: str, *, whole: bool = False) -> Callable:
    """Make a Rule of a check; its docstring is the rule's statement."""

    def make(check: Callable[..., str | None]) -> Rule:
        return Rule(id, verdict, confidence, source, fix, check, whole)

    return make


@cache
def table() -> tuple[Rule, ...]:
    """All rules, by number."""
    from ane.residency import rules

    found = [
        value for name in listing(rules) for value in vars(member(rules, name)).values() if isinstance(value, Rule)
    ]
    numbers = [r.id for r in found]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two rules share a number: {sorted(numbers)}")
    return tuple(sorted(found, key=lambda r: int(r.id[1:])))


def findings(op: Op, scene: Scene) -> list[tuple[Rule, str]]:
    """The rules that speak about an operation, the most severe first."""
    hits = [(r, reason) for r in table() if not r.whole and (reason := r.check(op, scene))]
    return sorted(hits, key=lambda hit: SEVERITY[hit[0].verdict])


def function_findings(scene: Scene) -> list[tuple[Rule, str]]:
    """The rules that speak about a whole function."""
    hits = [(r, reason) for r in table() if r.whole and (reason := r.check(None, scene))]
    return sorted(hits, key=lambda hit: SEVERITY[hit[0].verdict])
