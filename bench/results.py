"""The measured report: what `bench` writes, reads, blesses and gates. Its JSON Schema is published beside it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.hardware import Conditions, Hardware
from mlxkd.errors import UserError
from mlxkd.files import atomic_file
from mlxkd.metric import Metric, from_samples

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
POLICY = (
    "Every shape is run once before timing and that run is thrown away; loading and first compile are figures "
    "of their own. No outlier is removed: percentiles are observations (smallest one with that share at or below "
    "it), and what never happened counts as infinitely late."
)
# Sample series: name -> unit. A missing (null) sample never happened: a request without a valid call, say.
UNITS = {
    "ttft_ms": "ms", "tokenize_ms": "ms", "prefill_ms": "ms", "first_step_ms": "ms", "tpot_ms": "ms", "itl_ms": "ms",
    "tps": "tokens/s", "ttfa_ms": "ms", "ttfa_tokens": "tokens", "ttfa_steps": "steps",
    "ttfa_overhead_tokens": "tokens", "request_ms": "ms", "joules_per_token": "J/token",
}  # fmt: skip


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Target(Strict):
    """What was measured: an MLX folder, a bundle or an endpoint; ``artefact`` is the hash of its files."""

    name: str
    kind: Literal["mlx", "bundle", "endpoint"]
    location: str
    backend: str
    artefact: str | None = None
    details: dict[str, Any] = {}


class Workload(Strict):
    """The requests: two reports compare only when their hashes agree."""

    name: str
    hash: str
    settings: dict[str, Any] = {}


class Round(Strict):
    """One fresh process of one target: samples per series, counters per round, the conditions it ran under."""

    target: str
    index: int
    samples: dict[str, list[float | None]]
    counters: dict[str, float | None] = {}
    conditions: Conditions = Conditions()
    device: str


class Report(Strict):
    """A bench report."""

    schema_version: Literal[1] = 1
    kind: Literal["speed", "compare", "calibration", "toolcalls"]
    created: str
    hardware: Hardware
    workload: Workload
    targets: list[Target]
    rounds: list[Round]
    quality: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, list[str]] = {}
    residency: dict[str, dict[str, Any]] = {}
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    policy: str = POLICY
    notes: list[str] = []

    def target(self, name: str | None = None) -> Target:
        """The target of that name, or the only one."""
        found = [t for t in self.targets if name in (None, t.name)]
        if len(found) != 1:
            names = ", ".join(t.name for t in self.targets)
            raise UserError(f"which target? the report has {names}", hint="name one with --target")
        return found[0]

    def problems(self, target: str | None = None) -> list[str]:
        """What was not nominal in the rounds of a target (or of all), each kind once, with how often it was so."""
        rounds = [r for r in self.rounds if target in (None, r.target)]
        kinds = sorted({p.partition(" (")[0] for r in rounds for p in r.conditions.problems})
        counts = {k: sum(any(p.startswith(k) for p in r.conditions.problems) for r in rounds) for k in kinds}
        return [f"{kind} (in {count} of {len(rounds)} runs)" for kind, count in counts.items()]

    def series(self, target: str, name: str) -> list[list[float]]:
        """Samples of one series by round, in round order; a sample that never happened is infinite."""
        rounds = sorted((r for r in self.rounds if r.target == target), key=lambda r: r.index)
        return [[math.inf if v is None else v for v in r.samples[name]] for r in rounds if r.samples.get(name)]

    def metric(self, target: str, name: str) -> Metric:
        """One series over all rounds; without samples, a missing figure with its reason."""
        values = [v for r in self.series(target, name) for v in r]
        finite = [v for v in values if math.isfinite(v)]
        device = next((r.device for r in self.rounds if r.target == target), "unknown device")
        note = None if values else "the target reports no such event"
        return from_samples(
            finite, UNITS[name], method="measured", device=device, censored=len(values) - len(finite), note=note
        )

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return Path(path)


def load(path: str | Path) -> Report:
    """Read a report.

    Raises:
        UserError: no such file, not JSON, or not a bench report; names the first fault and where.
    """
    try:
        return Report.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "cannot read the report", where=str(path), hint="write one with `bench speed TARGET -o report.json`"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UserError(
            f"not a bench report: {first['msg']} at {place}", where=str(path), hint=f"the format is {SCHEMA_FILE.name}"
        ) from error


def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    return Report.model_json_schema()


def content_hash(value: Any) -> str:
    """Sixteen hex digits over a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
