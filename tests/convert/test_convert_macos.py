"""On a Mac: Core ML loads, compiles and runs our packages, and says what the reference runtime said of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.convert.check import divergence
from ane.convert.export import export
from ane.convert.options import Options
from ane.residency.plan import plan
from ane.residency.predict import predict
from ane.runtime import open_session

pytestmark = pytest.mark.macos
KL = 1e-2  # float16 throughout on the device, float32 between operations in the reference
UNITS = ("cpu_only", "cpu_and_gpu", "cpu_and_ne")
VARIANTS: dict[str, dict[str, Any]] = {
    "state": {},
    "explicit": {"kv": "explicit"},
    "two packages, verify": {"chunks": 2, "verify": 4},
    "batch 2": {"batch": (1, 2)},
    "positions in the model": {"positions": "model", "embedding": "model"},
    "gpu": {"profile": "gpu"},
    "int8": {"weights": "ane-int8"},
    "palette": {"weights": "ane-lut4"},
    "palette by channels": {"weights": "ane-lut4-gc8"},
    "argmax": {"head": "argmax", "head_width": 40},
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", VARIANTS)
def test_core_ml_agrees_with_the_reference_runtime(
    name: str, units: str, toy: Any, tmp_path: Path, record_property: Any
) -> None:
    options = Options(context=96, prefill=16, **VARIANTS[name])
    manifest = export(toy("qwen3", hidden_size=64, intermediate_size=128), tmp_path / "bundle", options)
    batch = max(manifest.batches)
    rng = np.random.default_rng(0)
    calls = [rng.integers(0, 96, (batch, size)) for size in (19, 1, 1, 3, 1)]
    ours = open_session(tmp_path / "bundle", "mil", batch)
    recorded = [ours.extend(tokens) for tokens in calls]
    started = time.perf_counter()
    theirs = open_session(tmp_path / "bundle", "coreml", batch, units=units, root=tmp_path / "compiled")
    worst, same = 0.0, True
    for tokens, expected in zip(calls, recorded, strict=True):
        got = theirs.extend(tokens)
        same &= bool((expected.argmax(-1) == got.argmax(-1)).all())
        if manifest.head == "logits":
            worst = max(worst, divergence(expected, got))
    record_property("kl_max", worst)
    record_property("same_tokens", same)
    record_property("seconds", time.perf_counter() - started)
    assert worst < KL
    assert same or manifest.head == "logits"


def test_core_ml_plans_every_function(toy: Any, tmp_path: Path, record_property: Any) -> None:
    """Records the share that Core ML plans for the Neural Engine beside the predicted one; reports, does not judge."""
    bundle = tmp_path / "bundle"
    manifest = export(toy("qwen3", hidden_size=64, intermediate_size=128), bundle, Options(context=96, prefill=16))
    predicted = {found.function: found.share for found in predict(bundle).functions}
    for function in manifest.packages[0].functions:
        planned = plan(bundle / manifest.packages[0].file, function)
        assert planned.missing is None, planned.missing
        assert planned.ops
        share = "unknown" if planned.share is None else f"{planned.share:.3f}"
        record_property(
            f"{function} on the Neural Engine", f"{share} of the cost planned, {predicted[function]:.3f} predicted"
        )
