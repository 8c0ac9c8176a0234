"""Plans from real Macs that correct the rules.

A calibration is one JSON file per machine and package, in the folder ``calibrations`` beside this module:

    {"format": 1, "chip": "Apple M4", "system": "macOS 26.1 (25B78)", "coremltools": "9.0", "package": "sha256...",
     "observations": [{"op": "conv", "rule": "R10", "device": "ANE", "count": 96}, ...]}

One observation counts the operations of a kind, of which the rule table said ``rule``, that Core ML's compute plan
put on ``device``. Make one on a Mac with `bench ane-residency BUNDLE --contribute FILE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ane.residency.chips import Chip, chip
from mlxkd.errors import UserError

FOLDER = Path(__file__).with_name("calibrations")


class Observation(BaseModel):
    """How many operations of one kind the plan put on one device."""

    model_config = ConfigDict(extra="forbid")
    op: str
    rule: str
    device: Literal["ANE", "CPU", "GPU"]
    count: int


class Calibration(BaseModel):
    """One contributed file."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    chip: str
    system: str
    coremltools: str
    package: str
    observations: list[Observation]


@dataclass(frozen=True)
class Correction:
    """What real plans of a chip say about operations of which a rule spoke."""

    op: str
    rule: str
    device: Literal["ANE", "CPU"]
    count: int
    of: int
    chip: str
    source: str


def load(path: str | Path) -> Calibration:
    """Read one file; raises UserError with the first fault and its place."""
    try:
        return Calibration.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("cannot read the calibration", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UserError(f"not a calibration: {first['msg']} at {place}", where=str(path)) from error


def corrections(target: Chip, folder: str | Path | None = None) -> list[Correction]:
    """Majority placements over all calibrations of the chip's generation; ties correct nothing."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    files: dict[tuple[str, str], list[str]] = {}
    for path in sorted(Path(folder or FOLDER).glob("*.json")):
        known = load(path)
        if chip(known.chip).name != target.name:
            continue
        for seen in known.observations:
            key, device = (seen.op, seen.rule), "ANE" if seen.device == "ANE" else "CPU"
            counts.setdefault(key, {})[device] = counts.get(key, {}).get(device, 0) + seen.count
            files.setdefault(key, []).append(path.name)
    found = []
    for (op, rule), devices in counts.items():
        total = sum(devices.values())
        device, count = max(devices.items(), key=lambda item: item[1])
        if 2 * count > total:
            source = ", ".join(sorted(set(files[op, rule])))
            found.append(Correction(op, rule, device, count, total, target.name, source))  # type: ignore[arg-type]
    return found
