"""From records to figures: the page ``docs/mil-conformance.md`` and the sample of tests for CI."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ane.mil.conformance import disputed

Record = dict[str, Any]
RECURRENT = {"lstm", "gru", "rnn"}
PRECISIONS = ("fp32", "mixed", "fp16")
STATUSES = ("passed", "unsupported", "disputed", "failed")
HEAD = """# Conformance of `ane.mil`

coremltools' own operation tests, run against the reference runtime: every model was built and saved by coremltools
{version}, read back from disk by `ane.mil`, run in `exact` mode, and compared with the outputs that the test expects.

This page is written by `python -m ane.mil.conformance replay`; the figures by `scripts/measure mil-conformance`.

"""
RULES = """
## Tolerance

* fp32 models: the one the test asks for, {fp32} as absolute + relative part.
* fp16 models, and models of fp32 precision with fp16 tensors in them ("mixed"): `8 u |expected|` with u = 2^-11
  (inputs, weights and output rounded to fp16), and where that is not enough eight times the largest change of the
  output when every input moves to a neighbouring fp16 number.
  Apple's own bound for these models is 0.5 absolute and 0.05 relative.

## By operation and opset

A case counts for every operation in its program but `cast`. The opset is that of the program. p passed,
u unsupported (refused by name), d disputed (see below), f failed.

| operation | opset | fp32 cases | p | u | d | f | fp16 and mixed cases | p | u | d | f | largest fp32 error |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def compared(records: Iterable[Record]) -> list[Record]:
    """The records of comparisons, without those of tests that compared nothing."""
    return [r for r in records if r["status"] in STATUSES]


def shares(records: Iterable[Record]) -> dict[str, tuple[float | None, int]]:
    """The three published shares, each with the number of cases behind it (None: no case).

    ``fp32_claimed_share`` leaves recurrent layers out; the passed shares are of what is claimed, and a disputed
    case counts as not passed. Mixed cases count with the fp16 ones.
    """
    found = compared(records)
    fp32 = [r for r in found if r["precision"] == "fp32"]
    plain = [r for r in fp32 if not RECURRENT & set(r["operations"])]
    claimed = [r for r in found if r["status"] != "unsupported"]
    return {
        "fp32_claimed_share": _share(plain, lambda r: r["status"] != "unsupported"),
        "fp32_passed_share": _share(
            [r for r in claimed if r["precision"] == "fp32"], lambda r: r["status"] == "passed"
        ),
        "fp16_passed_share": _share(
            [r for r in claimed if r["precision"] != "fp32"], lambda r: r["status"] == "passed"
        ),
    }


def _share(records: list[Record], test: Callable[[Record], bool]) -> tuple[float | None, int]:
    return (sum(map(test, records)) / len(records) if records else None), len(records)


def markdown(records: list[Record], version: str) -> str:
    """The page for docs."""
    found = compared(records)
    return (
        HEAD.format(version=version)
        + _summary(records, found)
        + RULES.format(fp32=_tolerances(found))
        + _rows(found)
        + _complaints(found)
    )


def _summary(records: list[Record], found: list[Record]) -> str:
    total = sum(r["count"] for r in records if r["status"] == "collected")
    tests = {r["test"] for r in records if r["status"] != "collected"}
    silent = sum(r["status"] == "nothing" for r in records)
    lines = [
        f"{len(tests)} of the {total or 'uncounted'} tests of the suite were run, evenly over test functions,",
        f"precision and opset; {silent} of them compare nothing (they expect an error, are skipped off macOS, or read",
        "the program only).",
        "",
        "| precision | cases | passed | unsupported | disputed | failed |",
        "|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        count = Counter(r["status"] for r in found if r["precision"] == precision)
        lines.append(f"| {precision} | {count.total()} | {' | '.join(str(count[s]) for s in STATUSES)} |")
    words = {
        "fp32_claimed_share": "of the non-recurrent fp32 cases are claimed",
        "fp32_passed_share": "of the claimed fp32 cases pass",
        "fp16_passed_share": "of the claimed fp16 and mixed cases pass",
    }
    lines.append("")
    for key, (share, n) in shares(found).items():
        lines.append(f"* `{key}`: {'no case' if share is None else f'{share:.2%}'} {words[key]} (n = {n})")
    return "\n".join(lines) + "\n"


def _tolerances(found: list[Record]) -> str:
    asked = Counter(f"{r['atol']:g} + {r['rtol']:g}" for r in found if r["precision"] == "fp32")
    return ", ".join(f"{words} ({n} cases)" for words, n in asked.most_common())


def _rows(found: list[Record]) -> str:
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in found:
        for operation in r["operations"]:
            cells[operation, r["opset"]].append(r)
    return "".join(_row(*key, cells[key]) for key in sorted(cells))


def _row(operation: str, opset: str, records: list[Record]) -> str:
    parts = [f"`{operation}`", opset]
    for plain in (True, False):
        count = Counter(r["status"] for r in records if (r["precision"] == "fp32") == plain)
        parts += [str(count.total()), *(str(count[s]) for s in STATUSES)]
    errors = [r["error"] for r in records if r["precision"] == "fp32" and r["error"] is not None]
    parts.append(f"{max(errors):.1e}" if errors else "")
    return f"| {' | '.join(parts)} |\n"


def _complaints(found: list[Record]) -> str:
    text = ""
    for status, title in (("failed", "Failures"), ("disputed", "Disputed"), ("unsupported", "Unsupported")):
        groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
        for r in found:
            if r["status"] == status:
                # Measured numbers differ from case to case and would split one cause into many lines.
                reason = re.sub(r"is off by [^:]*", "is off", r["detail"].splitlines()[0])
                groups[r["test"].partition("[")[0], r["precision"], re.sub(r"'\w+_\d+(_\w+)*'", "…", reason)].append(r)
        if groups:
            text += f"\n## {title}\n\n"
        for (test, precision, reason), records in sorted(groups.items()):
            text += f"* `{test}`, {precision}, {len(records)} cases: {reason}\n"
    return text


def choose(records: list[Record]) -> dict[str, list[str]]:
    """Tests for CI: "every_run" covers each operation once in fp32 (or at all), "strata" each (operation, opset,
    precision, shape class). Only tests whose every comparison passed; quicker ones first."""
    found = compared(records)
    bad = {r["test"] for r in found if r["status"] != "passed" or disputed.reason(r["test"])}
    # Ids with an address in them differ from run to run.
    good = [r for r in found if r["test"] not in bad and " at 0x" not in r["test"]]
    good.sort(key=lambda r: (r["precision"] != "fp32", r["seconds"], r["test"]))
    once = _cover(good, lambda r: [(o,) for o in r["operations"]])
    strata = _cover(good, lambda r: [(o, r["opset"], r["precision"], r["shape"]) for o in r["operations"]])
    return {"every_run": once, "strata": strata}


def _cover(records: list[Record], cells: Callable[[Record], list[tuple[str, ...]]]) -> list[str]:
    """Tests that together reach every cell, each taken because it reaches a new one."""
    seen: set[tuple[str, ...]] = set()
    chosen: list[str] = []
    for r in records:
        if not seen.issuperset(cells(r)):
            seen.update(cells(r))
            chosen.append(r["test"])
    return sorted(set(chosen))
