"""Rounding that starts soft and sharpens: its curve, its two ends, what trains and what ships."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_quant_identity import LLAMA, TOKENS, llama, same, train

from mlxkd.errors import UserError
from mlxkd.quant import attach, changed_codes, fake_weight, grid, pack, plan_for
from mlxkd.quant.grids._base import eased_round, eased_slope
from mlxkd.quant.phases import SHARPEST, anneal, check_annealing, sharpness_at

EASED = ["mlx-affine4-g32", "mlx-affine2-g64", "ane-int8"]


def curve(position: np.ndarray, k: float) -> np.ndarray:
    """The published function in float64."""
    fraction = position - np.floor(position)
    return np.floor(position) + (1 + np.tanh(k * (fraction - 0.5)) / np.tanh(k / 2)) / 2


@pytest.mark.parametrize("k", [0.01, 1.0, 10.0, SHARPEST])
def test_the_curve_and_its_slope(k: float) -> None:
    position = np.random.default_rng(0).uniform(-3, 3, 2000)
    given = mx.array(position.astype(np.float32))
    found = eased_round(given, mx.array(k))
    assert np.allclose(np.array(found), curve(position, k), atol=1e-3 if k < 1 else 1e-5)
    slope = np.array(eased_slope(given, found, mx.array(k)))
    step = 1e-6
    expected = (curve(position + step, k) - curve(position - step, k)) / (2 * step)
    assert np.allclose(slope, expected, rtol=2e-2, atol=2e-3)


def test_the_curve_goes_from_the_identity_to_rounding_without_a_jump() -> None:
    position = mx.array(np.linspace(-2, 2, 801, dtype=np.float32))
    assert np.allclose(np.array(eased_round(position, mx.array(0.05))), np.array(position), atol=1e-3)
    far = np.abs(np.array(position) % 1 - 0.5) > 0.05
    sharp = np.array(eased_round(position, mx.array(SHARPEST)))
    assert np.allclose(sharp[far], np.rint(np.array(position))[far], atol=1e-3)
    for k in (1.0, 5.0, 20.0):
        steps = np.diff(np.array(eased_round(position, mx.array(k))))
        assert (steps >= -1e-6).all() and steps.max() < 0.005 * k / 2 / np.tanh(k / 2) + 1e-4


def ends(name: str) -> tuple[int, int]:
    """How far a soft code may reach."""
    return (-127, 127) if name == "ane-int8" else (0, 2 ** grid(name).bits - 1)


@pytest.mark.parametrize("name", EASED)
@pytest.mark.parametrize("k", [0.05, 3.0, SHARPEST])
def test_a_soft_weight_follows_the_curve_within_its_range(name: str, k: float) -> None:
    g, rng = grid(name), np.random.default_rng(1)
    w = rng.standard_normal((16, 128)).astype(np.float32)
    ranges = g.ranges(mx.array(w))
    scales = np.array(ranges["scales"].astype(mx.float16 if name == "ane-int8" else mx.float32)).astype(np.float64)
    scales = np.repeat(scales.reshape(16, -1), w.size // scales.size, axis=1)
    biases = np.array(ranges["biases"]) if "biases" in ranges else np.zeros((16, 1))
    biases = np.repeat(biases, w.size // biases.size, axis=1)
    expected = curve(np.clip((w - biases) / scales, *ends(name)), k) * scales + biases
    found = np.array(g.eased(mx.array(w), ranges, mx.float32, mx.array(k)))
    slope = max(1.0, k / 2)  # the positions are of float32
    assert np.allclose(found, expected, atol=slope * 1e-4 * np.abs(scales).max() * max(map(abs, ends(name))))


@pytest.mark.parametrize("name", EASED)
def test_a_sharp_weight_lies_on_the_grid(name: str) -> None:
    g, rng = grid(name), np.random.default_rng(1)
    w = mx.array(rng.standard_normal((16, 128)).astype(np.float32))
    ranges = g.ranges(w)
    sharp, hard = np.array(g.eased(w, ranges, mx.float32, mx.array(1e4))), np.array(g.fake(w, mx.float32, ranges))
    assert np.mean(np.abs(sharp - hard) > 1e-3 * np.abs(hard) + 1e-5) < 0.01, "but for ties"


@pytest.mark.parametrize("name", EASED)
@pytest.mark.parametrize("k", [1.0, 8.0])
def test_gradients_are_those_of_the_soft_weight(name: str, k: float) -> None:
    """Directional finite differences in weight and ranges."""
    g, rng = grid(name), np.random.default_rng(2)
    w = mx.array(rng.standard_normal((8, 64)).astype(np.float32))
    names, start = g.range_names, {n: v.astype(mx.float16).astype(mx.float32) for n, v in g.ranges(w).items()}
    w = 0.97 * w  # the ends of a group lie on kinks, where a difference is no derivative
    cotangent = mx.array(rng.standard_normal(w.shape).astype(np.float32))

    def value(*given: mx.array) -> mx.array:
        return mx.sum(cotangent * g.eased(given[0], dict(zip(names, given[1:], strict=True)), mx.float32, mx.array(k)))

    starts = [w, *(start[n] for n in names)]
    _, gradients = mx.vjp(value, starts, [mx.array(1.0)])
    for i, gradient in enumerate(gradients):
        size = 1e-3 if i == 0 else 1e-3 * float(mx.mean(mx.abs(starts[i])))
        nudge = size * mx.sign(mx.array(rng.standard_normal(starts[i].shape).astype(np.float32)))
        if name == "ane-int8" and i == 1:  # scales are stored in float16: move them by whole steps of it
            nudge = (starts[1] * (1 + 2**-10)).astype(mx.float16).astype(mx.float32) - starts[1]
        up, down = ([s + sign * nudge if j == i else s for j, s in enumerate(starts)] for sign in (1, -1))
        found, expected = float(value(*up) - value(*down)) / 2, float(mx.sum(gradient * nudge))
        scale = float(mx.sqrt(mx.sum(mx.square(gradient * nudge))))
        assert found == pytest.approx(expected, abs=0.3 * scale)


@pytest.mark.parametrize("name", EASED)
def test_a_learned_scale_that_reached_zero_gives_finite_gradients(name: str) -> None:
    """Every code lies at an end then, so weights get none and a scale gets the sum of its codes."""
    g, w = grid(name), mx.array(np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32))
    ranges = {key: mx.zeros_like(value) for key, value in g.ranges(w).items()}

    def value(w: mx.array, scales: mx.array) -> mx.array:
        return mx.sum(g.eased(w, {**ranges, "scales": scales}, mx.float32, mx.array(4.0)))

    dw, dscales = mx.grad(value, argnums=(0, 1))(w, ranges["scales"])
    low, high = ends(name)
    expected = np.where(np.array(w) > 0, high, low).reshape(*dscales.shape, -1).sum(-1)
    assert not np.array(dw).any() and np.allclose(np.array(dscales), expected)


def test_sharpness_rises_geometrically_and_stays() -> None:
    values = [sharpness_at(x) for x in np.linspace(0, 1, 21)]
    assert values[0] == 1 and values[-1] == values[-2] == SHARPEST
    ratios = np.array(values[1:19]) / np.array(values[:18])
    assert np.allclose(ratios, ratios[0]) and ratios[0] > 1


@pytest.mark.parametrize("execution", ["kernel", "dense"])
@pytest.mark.parametrize("learned", [True, False])
def test_training_rounds_softly_and_shipping_rounds(execution: str, learned: bool) -> None:
    """Linear layers, embedding and tied head: what trains is soft, what is judged and packed lies on the grid."""
    model = llama()
    attach(model, plan_for(model, "mlx-affine3-g32"), execution=execution, learned_ranges=learned)
    model.train()
    straight, before = model(TOKENS), pack(model, LLAMA)
    anneal(model, mx.array(0.05))
    error, harder = (np.abs(np.array(x - llama()(TOKENS))).mean() for x in (model(TOKENS), straight))
    assert error < 0.6 * harder, "what is left is the clipping at the ends of groups"
    assert changed_codes(before, pack(model, LLAMA)) == 0
    weight = model.model.embed_tokens.weight
    train(model, steps=3)
    assert not same(weight, model.model.embed_tokens.weight)
    packed = pack(model, LLAMA)
    assert changed_codes(before, packed) > 0
    model.eval()
    assert same(model(TOKENS), packed.model(TOKENS)) or execution == "dense"
    assert np.allclose(np.array(model(TOKENS)), np.array(packed.model(TOKENS)), atol=1e-4)
    model.train()
    anneal(model, None)
    assert same(fake_weight(model.model.layers[0].mlp.up_proj), _evaluated(model))


def _evaluated(model: object) -> mx.array:
    layer = model.model.layers[0].mlp.up_proj  # type: ignore[attr-defined]
    layer.eval()
    return fake_weight(layer)


def test_grids_without_soft_rounding_are_named() -> None:
    plan = {"model.layers.0.mlp.up_proj": "ane-lut4", "lm_head": "float", "model.layers.0.mlp.down_proj": "mlx-nvfp4"}
    with pytest.raises(UserError, match=r"up_proj \(ane-lut4\).*down_proj \(mlx-nvfp4\)") as caught:
        check_annealing(plan)
    assert "lm_head" not in str(caught.value)
    check_annealing({"lm_head": "float", "model.layers.0.mlp.up_proj": "mlx-affine4-g32"})
    with pytest.raises(UserError, match="annealed rounding"):
        grid("mlx-nvfp4").eased(mx.zeros((2, 32)), {}, mx.float32, mx.array(1.0))
