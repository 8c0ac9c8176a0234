"""Affine ranges of little squared error, against a search over all ranges and against mx.quantize."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_quant_identity import LLAMA, TOKENS, llama, same, train

from mlxkd.errors import UserError
from mlxkd.quant import attach, grid, pack, plan_for
from mlxkd.quant.grids import Ranges
from mlxkd.quant.plan import Plan, refresh_ranges

BITS = [2, 3, 4, 8]


def weights(kind: str, rows: int = 24, width: int = 64) -> np.ndarray:
    rng = np.random.default_rng(5)
    drawn = {"normal": rng.standard_normal, "heavy": lambda size: rng.standard_t(3, size), "one sign": rng.random}[kind]
    return drawn((rows, width)).astype(np.float32)


def errors(w: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of groups of 32, float64 [...]; scales and biases [..., 1] broadcast against [..., 32]."""
    groups = w.astype(np.float64)
    codes = np.clip(np.rint((groups - biases) / scales), 0, 2**bits - 1)
    return ((codes * scales + biases - groups) ** 2).sum(-1)


def of_ranges(w: np.ndarray, ranges: Ranges, bits: int) -> np.ndarray:
    scales, biases = (np.array(ranges[name]).astype(np.float64)[..., None] for name in ("scales", "biases"))
    return errors(w.reshape(*scales.shape[:-1], 32), scales, biases, bits)


def searched(group: np.ndarray, bits: int) -> float:
    """The least error over 120 x 120 pairs of ends between the group's extremes."""
    low, high = np.meshgrid(*[np.linspace(group.min(), group.max(), 120)] * 2, indexing="ij")
    keep = high > low
    scales = ((high - low)[keep] / (2**bits - 1))[:, None]
    return float(errors(group[None], scales, low[keep][:, None], bits).min())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "one sign"])
def test_no_group_is_worse_than_at_its_extremes(bits: int, kind: str) -> None:
    w, g = weights(kind), grid(f"mlx-affine{bits}-g32")
    plain, fitted = (of_ranges(w, found(mx.array(w)), bits) for found in (g.ranges, g.fitted_ranges))
    assert np.all(fitted <= plain * (1 + 1e-4))
    assert fitted.mean() < (0.8 if bits == 2 else 0.999) * plain.mean()


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_near_the_best_of_all_ranges(bits: int, kind: str) -> None:
    w = weights(kind, rows=8)
    fitted = of_ranges(w, grid(f"mlx-affine{bits}-g32").fitted_ranges(mx.array(w)), bits).reshape(-1)
    best = np.array([searched(group, bits) for group in w.reshape(-1, 32).astype(np.float64)])
    assert fitted.mean() < 1.04 * best.mean()
    assert fitted.max() < 1.3 * best.max()


def test_groups_that_hold_few_values() -> None:
    w = np.zeros((4, 32), np.float32)
    w[1] = 0.37
    w[2, ::3] = -1.5  # two values: exact with two codes
    w[3, 0] = 1e-20
    ranges = grid("mlx-affine2-g32").fitted_ranges(mx.array(w))
    assert all(np.isfinite(np.array(value)).all() for value in ranges.values())
    codes = grid("mlx-affine2-g32").encode_with(mx.array(w), ranges, mx.float32)
    decoded = np.array(grid("mlx-affine2-g32").decode(codes, mx.float32))
    np.testing.assert_allclose(decoded, w, atol=1e-6)


def divergence(model: nn.Module, plan: Plan, **options: bool) -> float:
    """KL of the float model to the packed one with untrained ranges, nats."""
    floats = nn.log_softmax(model(TOKENS), axis=-1)
    ours = nn.log_softmax(pack(attach(model, plan, learned_ranges=True, **options), LLAMA).model(TOKENS), axis=-1)
    return mx.mean(mx.sum(mx.exp(floats) * (floats - ours), axis=-1)).item()


def test_a_student_starts_nearer_to_its_float_model() -> None:
    plan = plan_for(llama(), "mlx-affine2-g32")
    assert divergence(llama(), plan, fitted_ranges=True) < 0.8 * divergence(llama(), plan)


@pytest.mark.parametrize("fitted", [False, True])
def test_ranges_start_over_as_they_started(fitted: bool) -> None:
    model = attach(
        llama(), {"model.layers.0.mlp.up_proj": "mlx-affine3-g32"}, learned_ranges=True, fitted_ranges=fitted
    )
    layer = model.layers[0].mlp.up_proj
    train(model)
    refresh_ranges(model)
    asked = grid("mlx-affine3-g32")
    expected = (asked.fitted_ranges if fitted else asked.ranges)(layer.weight)
    for name, value in expected.items():
        assert same(layer[f"qat_default_{name}"], value)


def test_ranges_that_are_not_learned_cannot_be_fitted() -> None:
    with pytest.raises(UserError, match="where learned ranges start\nhint: attach with learned_ranges=True"):
        attach(llama(), {"model.layers.0.mlp.up_proj": "mlx-affine3-g32"}, fitted_ranges=True)
