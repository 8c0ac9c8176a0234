"""Bundles on the MIL reference runtime against MLX: greedy tokens and KL, real and random models.

MLX runs in float32 on the float16 numbers of the bundle; both sides are fed MLX's greedy tokens. A token counts as
identical when the choices agree, or when MLX's two best logits lie within four float16 steps (a tie for any
float16 program). Random models: tests/convert/toy_models.py. No Core ML here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from ane.convert import families
from ane.convert.check import divergence, reference
from ane.convert.export import export
from ane.convert.options import Options
from ane.runtime import open_session
from mlxkd.metric import Metric
from mlxkd.runtime import device_name

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MLXKD_TEST_DATA", ROOT / ".." / "shared" / "data"))
VARIANTS: tuple[dict[str, object], ...] = ({}, {"kv": "explicit", "chunks": 2}, {"profile": "gpu"})


def compare(folder: Path, bundle: Path, steps: int) -> tuple[int, float]:
    """(identical tokens, largest KL in nats) over so many greedy steps from token 1."""
    theirs, ours = reference(folder), open_session(bundle, "mil")
    token, same, worst = 1, 0, 0.0
    for _ in range(steps):
        expected = np.array(theirs.extend(np.array([[token]])))[0, -1]
        got = ours.extend(np.array([[token]]))[0, -1]
        token, other = int(expected.argmax()), int(got.argmax())
        tie = expected[token] - expected[other] <= 4 * np.spacing(np.float16(abs(expected[token])))
        same += token == other or bool(tie)
        worst = max(worst, divergence(expected, got))
    return same, worst


def measure(quick: bool) -> dict[str, Metric]:
    """``identical_tokens`` (of 200, the worst bundle), ``kl_max``, ``families`` (how many hold both)."""
    sys.path.insert(0, str(ROOT / "tests" / "convert"))
    from toy_models import make_toy

    steps = 20 if quick else 200
    rows: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = {family: make_toy(Path(scratch) / family, family) for family in families.names()}
        if (DATA / "stories260K").exists():
            sources["real llama"] = DATA / "stories260K"
        for name, folder in sources.items():
            for i, choices in enumerate(VARIANTS[:1] if quick else VARIANTS):
                out = Path(scratch) / f"{name}.{i}.bundle"
                export(folder, out, Options(context=256, prefill=16, **choices))  # type: ignore[arg-type]
                rows[f"{name}, {choices or 'ane, state'}"] = compare(folder, out, steps)
    device, worst = device_name(), max(kl for _, kl in rows.values())
    good = {name.split(",")[0] for name, (same, kl) in rows.items() if same == steps and kl <= 1e-3}
    bad = {name.split(",")[0] for name, (same, kl) in rows.items() if same < steps or kl > 1e-3}
    note = f"{len(rows)} bundles, {steps} steps each" + (f"; not: {', '.join(sorted(bad))}" if bad else "")
    same = min(same for same, _ in rows.values())
    return {
        "identical_tokens": Metric(same, "tokens", "measured", device, n=steps, note=note),
        "kl_max": Metric(worst, "nats/token", "measured", device, n=steps * len(rows)),
        "families": Metric(len((good - bad) - {"real llama"}), "families", "measured", device, n=len(families.names())),
    }
