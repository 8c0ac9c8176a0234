"""Measured signals of the Neural Engine at work: power counters, Core ML traces, paired latencies.

Parsers read what the tools print. A zero where there was load is missing, not zero: the energy counters of
some systems stand still (mactop PR 72 and 82, all-smi 410).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from mlxkd.errors import UserError

MACMON = "macmon pipe -i 1000"
SHORTEST_WINDOW = 10.0  # seconds: counters that alternate between zero and double even out over this


@dataclass(frozen=True)
class PowerSample:
    """Mean power over ``seconds``, in watts; None where the tool does not report a rail."""

    seconds: float
    ane: float | None = None
    cpu: float | None = None
    gpu: float | None = None
    system: float | None = None


@dataclass(frozen=True)
class Interval:
    """One stretch of Neural Engine work, in seconds from the start of the trace."""

    start: float
    duration: float
    label: str


def parse_powermetrics(text: str) -> list[PowerSample]:
    """``powermetrics --samplers ane_power,cpu_power,gpu_power -i 1000``: one sample per "Sampled system activity".

    Raises:
        UserError: no sample in the text.
    """
    samples = []
    parts = re.split(r"^\*\*\* Sampled system activity[^\n]*", text, flags=re.MULTILINE)
    heads = re.findall(r"^\*\*\* Sampled system activity[^\n]*\(([\d.]+)ms elapsed\)", text, flags=re.MULTILINE)
    if len(heads) != len(parts) - 1:
        raise UserError(
            "a powermetrics sample has no elapsed time", hint="record with -i 1000 and keep the whole output"
        )
    for elapsed, body in zip(heads, parts[1:], strict=True):
        rails = {name: float(value) / 1000 for name, value in re.findall(r"^(ANE|CPU|GPU) Power: (\d+) mW", body, re.M)}
        combined = re.search(r"^Combined Power[^:\n]*: (\d+) mW", body, re.M)
        if rails:
            total = float(combined[1]) / 1000 if combined else None
            samples.append(
                PowerSample(float(elapsed) / 1000, rails.get("ANE"), rails.get("CPU"), rails.get("GPU"), total)
            )
    if not samples:
        raise UserError(
            "no power sample in this text",
            hint="sudo powermetrics --samplers ane_power,cpu_power,gpu_power -i 1000",
        )
    return samples


def parse_macmon(text: str, *, interval: float = 1.0) -> list[PowerSample]:
    """``macmon pipe -i MS``: one JSON object per line, powers in watts.

    Args:
        interval: seconds between lines, as given to the tool.

    Raises:
        UserError: a line that is not such an object, with its number. A last line cut short is left out.
    """
    samples: list[PowerSample] = []
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            tree = json.loads(line)
            fields = [_watts(tree.get(k)) for k in ("ane_power", "cpu_power", "gpu_power", "sys_power")]
        except (ValueError, AttributeError, TypeError) as error:
            if number == len(lines) and samples:
                break
            raise UserError(
                f"not a macmon sample: {error}", where=f"line {number}", hint="macmon pipe -i 1000"
            ) from error
        samples.append(PowerSample(interval, *fields))
    if not samples:
        raise UserError("no power sample in this text", hint=MACMON)
    return samples


def _watts(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no power")
    return float(value)


def parse_xctrace(text: str, *, schema: str = "ane-hw-intervals") -> list[Interval]:
    """``xctrace export --xpath '.../table[@schema="ane-hw-intervals"]'``; cells repeat by reference to their id.

    Raises:
        UserError: not such an export, a table of another schema, or a reference to nothing.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"not an xctrace export: {error}", hint="xctrace export --input T.trace --xpath ...") from error
    names = {s.get("name") for s in root.iter("schema")}
    if names != {schema}:
        raise UserError(f"the export holds {sorted(map(str, names)) or 'no table'}, not {schema}")
    known = {element.get("id"): element for element in root.iter() if element.get("id")}
    found = []
    for number, row in enumerate(root.iter("row"), 1):
        try:
            cells = [known[cell.get("ref")] if cell.get("ref") else cell for cell in row]
            start = next(c for c in cells if c.tag == "start-time")
            duration = next(c for c in cells if c.tag == "duration")
            label = next((c.get("fmt") or c.text or "" for c in cells if c.tag in ("string", "formatted-label")), "")
            found.append(Interval(int(start.text or "") / 1e9, int(duration.text or "") / 1e9, label))
        except (KeyError, StopIteration, ValueError) as error:
            raise UserError(f"a row without a readable start and duration: {error!r}", where=f"row {number}") from error
    return found


def busy_share(intervals: Sequence[Interval], start: float, end: float) -> float:
    """Share of the window [start, end] in which the Neural Engine worked (overlaps count once)."""
    if end <= start:
        raise ValueError(f"an empty window: {start} to {end}")
    spans = sorted((max(i.start, start), min(i.start + i.duration, end)) for i in intervals)
    busy, reach = 0.0, start
    for begin, stop in spans:
        if stop > max(begin, reach):
            busy += stop - max(begin, reach)
            reach = stop
    return busy / (end - start)


def energy(samples: Sequence[PowerSample], idle: Sequence[PowerSample], rail: str) -> tuple[float | None, str]:
    """Joules above idle on a rail ("ane", "cpu", "gpu", "system") over a window, or None with the reason.

    The mean idle power is taken off: integral of P dt - idle * t.
    """
    values = [(s.seconds, getattr(s, rail)) for s in samples]
    quiet = [(s.seconds, getattr(s, rail)) for s in idle]
    length = sum(seconds for seconds, _ in values)
    if length < SHORTEST_WINDOW:
        return None, f"a window of {length:.1f} s; {SHORTEST_WINDOW:.0f} s are needed"
    if not quiet or any(v is None for _, v in values + quiet):
        return None, f"the tool reports no {rail} power, or no idle window was recorded"
    spent = sum(seconds * float(v or 0) for seconds, v in values)
    if spent == 0:
        return None, f"the {rail} counter reads zero under load: it stands still on this system"
    floor = sum(seconds * float(v or 0) for seconds, v in quiet) / sum(seconds for seconds, _ in quiet)
    return spent - floor * length, ""


def paired_speedup(cpu_only: Sequence[float], with_ane: Sequence[float]) -> float:
    """Median CPU-only latency over median CPU-and-Neural-Engine latency of interleaved runs.

    A ratio near 1 says that the Neural Engine took nothing of weight; it is evidence, never a residency.
    """
    if len(cpu_only) != len(with_ane) or len(cpu_only) < 3:
        raise ValueError(f"{len(cpu_only)} and {len(with_ane)} runs; pairs are needed, three at least")
    return sorted(cpu_only)[len(cpu_only) // 2] / sorted(with_ane)[len(with_ane) // 2]
