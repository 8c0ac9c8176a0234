"""Neural Engine grids against k-means of SciPy's kind, NumPy and Core ML's own decompression."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_quant_identity import LLAMA, TOKENS, llama, same, train

from mlxkd.compat import load_model
from mlxkd.errors import UserError
from mlxkd.quant import attach, changed_codes, fake_weight, grid, load_student, names, pack, plan_for, save_student
from mlxkd.quant.grids.ane_lut import nearest
from mlxkd.quant.kmeans import distinct_half_values, kmeans, squared_error
from mlxkd.quant.plan import refresh_ranges
from mlxkd.runtime import import_coremltools

RNG = np.random.default_rng(11)
ANE_GRIDS = [name for name in names() if name.startswith("ane-")]


def weights(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32) * 0.1)


def best_by_dynamic_programming(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """The least squared error any clustering reaches, by exhaustive dynamic programming over sorted values."""
    n = len(values)
    w, s, q = (np.concatenate([[0], np.cumsum(weights * values**p)]) for p in (0, 1, 2))

    def cost(i: int, j: int) -> float:
        return q[j] - q[i] - (s[j] - s[i]) ** 2 / (w[j] - w[i])

    best = np.array([0.0] + [cost(0, j) for j in range(1, n + 1)])
    for _ in range(clusters - 1):
        best = np.array([0.0] + [min(best[i] + cost(i, j) for i in range(j)) for j in range(1, n + 1)])
    return float(best[n])


@pytest.mark.parametrize("clusters", [2, 4, 8])
def test_kmeans_is_close_to_the_optimum(clusters: int) -> None:
    values, counts = distinct_half_values(RNG.standard_normal(80))
    ours = squared_error(values, counts, kmeans(values, counts, clusters))
    optimum = best_by_dynamic_programming(values, counts, clusters)
    assert optimum * (1 - 1e-9) <= ours <= optimum * 1.15


def test_kmeans_of_few_values_is_exact() -> None:
    values, counts = distinct_half_values(np.array([0.5, -1.0, 0.5, 2.0]))
    assert list(kmeans(values, counts, 8)) == [-1.0, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("entries", [4, 16, 64, 256])
def test_nearest_is_argmin_of_distance(entries: int) -> None:
    values = RNG.standard_normal((3, 500)).astype(np.float32)
    palette = np.sort(RNG.standard_normal((3, entries)), axis=-1).astype(np.float16)
    found = np.array(nearest(mx.array(values), mx.array(palette)))
    wide = palette.astype(np.float64)
    distance = np.abs(values[..., None] - wide[:, None])
    chosen = np.take_along_axis(distance, found[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), atol=1e-6)


def test_int8_is_symmetric_rounding_per_channel() -> None:
    g, w = grid("ane-int8"), weights(6, 40)
    w[2] = 0.0
    codes = g.encode(w, mx.float16)
    scale = (np.abs(np.array(w).astype(np.float16).astype(np.float32)).max(1) / 127).astype(np.float16)
    rows = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(np.array(codes["scales"])[rows], scale[rows])
    by_hand = np.rint(np.array(w) / scale.astype(np.float32).clip(1e-6)[:, None]).clip(-127, 127)
    np.testing.assert_array_equal(np.array(codes["codes"]), by_hand)
    assert not np.array(g.decode(codes, mx.float16))[2].any()


@pytest.mark.parametrize("name", ANE_GRIDS)
@pytest.mark.parametrize("shape", [(32, 24), (3, 32, 24)])
def test_fake_equals_decode_and_gradients_pass(name: str, shape: tuple[int, ...]) -> None:
    g, w = grid(name), weights(*shape)
    ranges = g.ranges(w)
    (value,), gradients = mx.vjp(
        lambda v, *r: g.fake(v, mx.float16, dict(zip(ranges, r, strict=True))),
        [w, *ranges.values()],
        [mx.ones(shape, mx.float16)],
    )
    assert same(value, g.decode(g.encode(w, mx.float16), mx.float16))
    assert mx.array_equal(gradients[0], mx.ones(shape))
    assert len(np.unique(np.array(value).reshape(-1, 32 * 24)[0])) <= 32 * 2**g.bits
    if "palette" in ranges:  # every weight's gradient lands on exactly one entry
        assert float(mx.sum(gradients[1])) == w.size


def test_palette_gradient_goes_to_the_entry_each_weight_chose() -> None:
    g = grid("ane-lut2")
    w, palette = mx.array([[-1.0, -0.9, 0.1, 2.0], [0.2, 0.0, 1.9, -1.1]]), mx.array([[2.0, -1.0, 0.0, 9.0]])
    cotangent = mx.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    gradient = mx.grad(lambda p: mx.sum(cotangent * g.fake(w, mx.float32, {"palette": p})))(palette)
    assert gradient.tolist() == [[72.0, 131.0, 52.0, 0.0]]  # in the learned order, which is not sorted


@pytest.mark.parametrize("name", ["ane-int8", "ane-lut2", "ane-lut4", "ane-lut6", "ane-lut4-gc8", "ane-lut3-gc16"])
def test_core_ml_decompresses_to_the_decoded_weight(name: str) -> None:
    """The oracle is coremltools' own value inference of the constexpr op."""
    pytest.importorskip("coremltools")
    ct = import_coremltools()
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    g, w = grid(name), weights(16, 12)
    codes = g.encode(w, mx.float16)
    made = g.constexpr(codes)
    arrays = dict(made.arrays)
    if made.op == "constexpr_lut_to_dense":
        width = types.type_mapping.string_to_nptype(f"uint{made.bits}")
        arrays["indices"] = arrays["indices"].astype(width)
    seen = {}

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
    def program(x):  # type: ignore[no-untyped-def]
        seen["op"] = getattr(mb, made.op)(**arrays)
        return mb.add(x=x, y=mb.reduce_sum(x=mb.cast(x=seen["op"], dtype="fp32")))

    theirs = seen["op"].op.materialized_val_inference()
    np.testing.assert_array_equal(theirs, np.array(g.decode(codes, mx.float16)))


@pytest.mark.parametrize("name", ["ane-int8", "ane-lut4", "ane-lut3-gc8"])
@pytest.mark.parametrize("learned", [False, True])
def test_students_train_ship_and_reload_without_recoding(name: str, learned: bool, tmp_path: Path) -> None:
    model = llama()
    attach(model, plan_for(model, name), learned_ranges=learned)
    first = pack(model, LLAMA)
    train(model, compiled=name == "ane-lut4")
    packed = pack(model, LLAMA)
    assert changed_codes(first, packed) > 0
    save_student(tmp_path / "s", packed, tmp_path)
    plain, config = load_model(tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert "quantization" not in config
    assert same(plain(TOKENS), packed.model(TOKENS)) and same(plain(TOKENS), model(TOKENS))
    assert changed_codes(packed, again) == 0
    for path, codes in again.codes.items():
        assert same(grid(name).decode(codes, mx.float32), fake_weight(dict(model.named_modules())[path])), path


def test_refreshed_palettes_follow_the_masters() -> None:
    model = llama()
    attach(model, plan_for(model, "ane-lut3"))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = layer.weight * 3
    stale = mx.mean((fake_weight(layer) - layer.weight) ** 2)
    refresh_ranges(model)
    assert mx.mean((fake_weight(layer) - layer.weight) ** 2) < stale / 4


def test_bfloat16_is_refused_for_core_ml_grids() -> None:
    model = llama()
    with pytest.raises(UserError, match=r"ane-lut4 \(layer .*\) cannot be deployed in bfloat16"):
        attach(model, plan_for(model, "ane-lut4"), dtype=mx.bfloat16)


def test_uneven_channel_groups_are_named() -> None:
    with pytest.raises(UserError, match=r"its 172 output channels are not divisible by 8"):
        plan_for(llama(intermediate_size=172), "ane-lut4-gc8")
