"""The prediction over saved packages: the naive patterns are caught and named, costs weigh, calibrations correct."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.residency import calibration, contribute, picture
from ane.residency.predict import Residency, predict
from mlxkd.errors import UserError
from mlxkd.runtime import import_coremltools


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved package as a first attempt would be: gather, int32 arithmetic, per-block scales, fused attention."""
    ct: Any = import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    inputs = [mb.TensorSpec((1, 4), types.int32), mb.TensorSpec((1, 64, 1, 32), types.fp16)]

    @mb.program(input_specs=inputs, opset_version=ct.target.iOS18)
    def program(tokens: Any, x: Any) -> Any:
        rng = np.random.default_rng(0)
        ids = mb.add(x=tokens, y=np.int32(1), name="int_add")
        embedded = mb.gather(x=rng.normal(size=(128, 64)).astype(np.float16), indices=ids, axis=0, name="embed")
        w = mb.constexpr_blockwise_shift_scale(
            data=rng.integers(-8, 8, (64, 64, 1, 1)).astype(np.int8),
            scale=np.full((64, 2, 1, 1), 0.1, np.float16),
        )
        y = mb.conv(x=x, weight=w, pad_type="valid", name="block_conv")
        clean = mb.conv(x=y, weight=rng.normal(size=(64, 64, 1, 1)).astype(np.float16), pad_type="valid", name="conv")
        q = mb.reshape(x=clean, shape=(1, 2, 32, 32), name="heads")
        return mb.scaled_dot_product_attention(query=q, key=q, value=q, name="fused"), embedded

    model = ct.convert(
        program, source="milinternal", convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16, skip_model_load=True, pass_pipeline=ct.PassPipeline.EMPTY,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("naive") / "naive.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def result(naive: Path) -> Residency:
    return predict(naive, "m4")


def test_the_naive_patterns_are_caught_by_name(result: Residency) -> None:
    off = {p.name: p.rule for p in result.functions[0].exceptions}
    assert off["int_add"] == "R3"
    assert off["embed"] == "R4"
    assert off["block_conv"] == "R17"
    assert off["fused"] == "R12"
    assert "conv" not in off and "heads" not in off
    assert all(p.reason and p.fix and p.source for p in result.functions[0].exceptions)


def test_ranged_shapes_are_caught(tmp_path: Path) -> None:
    ct: Any = import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import get_new_symbol, types

    @mb.program(input_specs=[mb.TensorSpec((1, 64, 1, get_new_symbol()), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.relu(x=x, name="ranged")

    ranged = ct.TensorType(name="x", shape=(1, 64, 1, ct.RangeDim(1, 128, 8)), dtype=np.float16)
    model = ct.convert(
        program, source="milinternal", convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
        inputs=[ranged], skip_model_load=True, pass_pipeline=ct.PassPipeline.EMPTY,
    )  # fmt: skip
    model.save(str(tmp_path / "p.mlpackage"))
    found = predict(tmp_path)
    assert found.share == 0 and found.functions[0].placements[0].rule == "R5"


def test_shares_are_weighed_by_cost_and_sum_to_one(result: Residency) -> None:
    function = result.functions[0]
    assert sum(p.share for p in function.placements) == pytest.approx(1)
    there = sum(p.share for p in function.placements if p.device == "ANE")
    assert result.share == pytest.approx(there) and 0 < there < 1
    by_name = {p.name: p.share for p in function.placements}
    # 8 KiB of fp16 weights and 4 KiB in and out each way, against half the weights: bytes decide.
    moved = 2 * 64 * 32 * 2
    assert by_name["conv"] / by_name["block_conv"] == pytest.approx((8192 + moved) / (4096 + 256 + moved), rel=0.02)


def test_states_and_parts_cost_what_they_move() -> None:
    """A slice of a large tensor costs the slice, a state in place nothing: closed forms over the types."""
    from ane.mil.program import Node
    from ane.mil.types import TensorType
    from ane.residency.program import Op, Operand, moved_bytes

    large, small = TensorType("fp16", (8, 1024)), TensorType("fp16", (1, 32))
    given = {"x": (Operand("x", large),), "update": (Operand("u", small),)}
    for kind, wanted in (("read_state", 0), ("slice_update", 128), ("gather", 128), ("relu", 2 * (8 * 1024 + 2 * 32))):
        op = Op(Node(kind, kind, {}, ()), given, (small,), (), False)
        assert moved_bytes(op) == wanted


def test_segments_count_the_changes_of_device(result: Residency) -> None:
    segments = result.functions[0].segments
    assert sum(n for _, n in segments) == len(result.functions[0].placements)
    assert all(a[0] != b[0] for a, b in pairwise(segments))


def test_json_and_metric(result: Residency) -> None:
    tree = json.loads(json.dumps(result.to_json()))
    assert tree["method"] == "predicted" and tree["chip"] == "m4"
    assert result.metric().method == "predicted" and result.metric().device is None


def test_the_picture_shows_every_operation_with_its_reason(result: Residency) -> None:
    from xml.etree import ElementTree

    svg = ElementTree.fromstring(picture.svg(result))
    titles = [e.text or "" for e in svg.iter("{http://www.w3.org/2000/svg}title")]
    for placement in result.functions[0].placements:
        assert any(placement.name in title and placement.device in title for title in titles)


def test_unknown_chips_and_missing_packages_are_named(naive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown chip 'm77'"):
        predict(naive, "m77")
    with pytest.raises(UserError, match=r"no \.mlpackage here"):
        predict(tmp_path)


def calibrated(folder: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "format": 1, "chip": "Apple M4", "system": "macOS 26.1", "coremltools": "9.0", "package": "ab",
        "observations": [{"op": "conv", "rule": "R17", "device": "ANE", "count": 3},
                         {"op": "conv", "rule": "R17", "device": "CPU", "count": 1}],
    }  # fmt: skip
    path = folder / "m4.json"
    path.write_text(json.dumps(fields | changes))
    return path


@pytest.fixture(scope="module")
def bundle(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, exported with the profile for the Neural Engine."""
    from ane.convert.export import export
    from ane.convert.options import Options

    out = tmp_path_factory.mktemp("bundle") / "b"
    export(stories_model, out, Options(context=128, prefill=8))
    return out


def test_our_own_bundle_is_predicted_resident_and_every_exception_is_named(bundle: Path) -> None:
    for target in ("m1", "m4"):
        found = predict(bundle, target)
        assert set(found.by_function()) == {"prefill", "decode"} and found.share >= 0.95
        for function in found.functions:
            # Only the index arithmetic of the cache's write position is left to the CPU.
            assert {(p.op, p.rule) for p in function.exceptions} <= {("concat", "R3"), ("add", "R3")}


def test_real_plans_correct_the_rules_and_say_so(naive: Path, tmp_path: Path) -> None:
    calibrated(tmp_path)
    corrected = {p.name: p for p in predict(naive, "m4", calibrations=tmp_path).functions[0].placements}
    assert corrected["block_conv"].device == "ANE"
    assert corrected["block_conv"].reason.startswith("planned there by 3 of 4 such operations on a real m4")
    assert corrected["block_conv"].source == "m4.json"
    other = {p.name: p for p in predict(naive, "m2", calibrations=tmp_path).functions[0].placements}
    assert other["block_conv"].device == "CPU"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not a calibration: .* at format"),
        ({"observations": [{"op": "conv"}]}, "at observations.0.rule"),
        ({"extra": 1}, "at extra"),
    ],
)
def test_malformed_calibrations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration.load(calibrated(tmp_path, **changes))


def test_a_contribution_is_a_calibration(result: Residency, tmp_path: Path) -> None:
    planned = {
        "main": [{"op": "conv", "name": "conv", "device": "ANE"}, {"op": "conv", "name": "block_conv", "device": "CPU"}]
    }
    machine = {"chip": "Apple M4", "system": "macOS 26.1", "coremltools": "9.0", "package": "x"}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(contribute.contribution(result, planned, machine=machine)))
    seen = {(o.op, o.rule, o.device): o.count for o in calibration.load(path).observations}
    assert seen == {("conv", "R10", "ANE"): 1, ("conv", "R17", "CPU"): 1}


def test_the_shipped_calibrations_are_valid() -> None:
    for path in calibration.FOLDER.glob("*.json"):
        calibration.load(path)
