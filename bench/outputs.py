"""Gate results as JSON, JUnit XML and a document for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from bench.gates import Gate, Outcome, overall
from mlxkd.report import Document, Heading, Section, Table, Text
from mlxkd.report.sections import Tone
from mlxkd.report.values import show_number, show_quantity

TONES: dict[Outcome, Tone] = {"pass": "good", "fail": "bad", "cannot tell": "unsure", "not available": "note"}


def shown(gate: Gate, value: float | None) -> str:
    """A figure of a gate: ratios as a signed percentage, shares in percent, the rest with their unit."""
    if value is None:
        return "–"
    if gate.unit == "ratio":
        return f"{round(100 * (value - 1), 1) + 0.0:+.1f} %"  # adding 0.0 drops the sign of a negative zero
    if gate.unit == "share":
        return show_quantity(value, "share")
    return f"{show_number(value)} {gate.unit}"


def sentence(gate: Gate) -> str:
    """One gate in words: figure, interval, limit, what would settle it."""
    words: list[str] = [gate.outcome]
    if gate.value is not None:
        words.append(f"{shown(gate, gate.value)} (limit {shown(gate, gate.limit)})")
    if gate.low is not None and gate.high is not None and gate.low != gate.high:
        words.append(f"between {shown(gate, gate.low)} and {shown(gate, gate.high)}")
    if gate.outcome == "cannot tell" and gate.value is not None:
        enough = (
            "no number of rounds is likely to" if gate.more_rounds is None else f"{gate.more_rounds} more rounds would"
        )
        words.append(f"{enough} settle it")
    if gate.note:
        words.append(gate.note)
    return "; ".join(words)


def table(gates: Sequence[Gate]) -> Table:
    """All gates at a glance."""
    rows = []
    for gate in gates:
        interval = None if gate.low is None else f"{shown(gate, gate.low)} to {shown(gate, gate.high)}"
        figures = (shown(gate, gate.value), interval, shown(gate, gate.limit))
        rows.append((gate.name, gate.outcome, *figures, gate.more_rounds, gate.note))
    return Table(("gate", "outcome", "figure", "interval", "limit", "more rounds", "note"), rows)


def document(gates: Sequence[Gate], *, title: str, notes: Sequence[str] = ()) -> Document:
    """The verdict first, then every gate."""
    outcome = overall(gates)
    named = ", ".join(g.name for g in gates if g.outcome == outcome)
    first = {
        "pass": "Every gate passes.",
        "fail": f"Over the limit: {named}.",
        "cannot tell": f"Too close to the noise: {named}.",
        "not available": "No gate could be run.",
    }[outcome]
    sections: list[Section] = [Text(first, TONES[outcome])]
    sections += [Text(note, "note") for note in notes]
    return Document(title, [*sections, Heading("Gates"), table(gates)])


def to_json(gates: Sequence[Gate]) -> dict[str, Any]:
    """The verdicts as one object; infinities become the string "inf"."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and abs(value) == float("inf") else value

    return {
        "outcome": overall(gates),
        "gates": [{k: plain(v) for k, v in asdict(g).items() if v not in (None, "")} for g in gates],
    }


def junit(gates: Sequence[Gate], *, suite: str = "bench gate") -> str:
    """JUnit XML: fail is a failure, cannot tell an error, not available skipped."""
    counts = {o: sum(g.outcome == o for g in gates) for o in TONES}
    root = ElementTree.Element(
        "testsuite",
        name=suite,
        tests=str(len(gates)),
        failures=str(counts["fail"]),
        errors=str(counts["cannot tell"]),
        skipped=str(counts["not available"]),
    )
    tags = {"fail": "failure", "cannot tell": "error", "not available": "skipped"}
    for gate in gates:
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=gate.name)
        if gate.outcome in tags:
            ElementTree.SubElement(case, tags[gate.outcome], message=sentence(gate))
        else:
            ElementTree.SubElement(case, "system-out").text = sentence(gate)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
