"""Elementwise operations, activations and reductions against torch in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

POSITIVE = {"sqrt"}
UNIT = {"acos", "asin", "atanh"}
UNARY = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
}
BINARY = {
    "add": torch.add,
    "floor_div": torch.floor_divide,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "real_div": torch.div,
    "sub": torch.sub,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
}
WITH_CONSTANTS = [
    ("clip", {"alpha": -0.5, "beta": 1.5}, lambda x: x.clamp(-0.5, 1.5)),
    ("threshold", {"alpha": 0.25}, lambda x: x.clamp(min=0.25)),
    ("inverse", {"epsilon": 0.125}, lambda x: 1 / (x + 0.125)),
    ("log", {"epsilon": 9.0}, lambda x: torch.log(x + 9)),
    ("rsqrt", {"epsilon": 9.0}, lambda x: torch.rsqrt(x + 9)),
    ("elu", {"alpha": 0.7}, lambda x: F.elu(x, 0.7)),
    ("leaky_relu", {"alpha": 0.1}, lambda x: F.leaky_relu(x, 0.1)),
    ("prelu", {"alpha": [0.1, 0.2, -0.3]}, lambda x: F.prelu(x, torch.tensor([0.1, 0.2, -0.3], dtype=x.dtype))),
    ("clamped_relu", {"alpha": 0.1, "beta": 1.0}, lambda x: F.leaky_relu(x, 0.1).clamp(max=1.0)),
    ("thresholded_relu", {"alpha": 0.5}, lambda x: F.threshold(x, 0.5, 0.0)),
    ("linear_activation", {"alpha": 2.0, "beta": -1.0}, lambda x: 2 * x - 1),
    ("scaled_tanh", {"alpha": 1.7, "beta": 0.6}, lambda x: 1.7 * torch.tanh(0.6 * x)),
    ("sigmoid_hard", {"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid),
    ("softplus_parametric", {"alpha": [0.5] * 3, "beta": [2.0] * 3}, lambda x: F.softplus(x, 2.0)),
    ("gelu", {"mode": "EXACT"}, F.gelu),
    ("gelu", {"mode": "TANH_APPROXIMATION"}, lambda x: F.gelu(x, approximate="tanh")),
    ("gelu", {"mode": "SIGMOID_APPROXIMATION"}, lambda x: x * torch.sigmoid(1.702 * x)),
    ("softmax", {"axis": 1}, lambda x: F.softmax(x, 1)),
]
REDUCE = {
    "reduce_l1_norm": lambda x, d, k: torch.linalg.vector_norm(x, 1, d, k),
    "reduce_l2_norm": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),
    "reduce_log_sum": lambda x, d, k: x.sum(d, k).log(),
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, d, k: x.square().sum(d, k),
}


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...] = (2, 3, 4, 5)) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32) * 2
    if name in POSITIVE:
        x = np.abs(x)
    return np.tanh(x) * np.float32(0.99) if name in UNIT else x


def _wide(x: np.ndarray):
    return torch.tensor(x).double()


@pytest.mark.parametrize("name", UNARY)
def test_unary(call, rng, name: str) -> None:
    x = _values(rng, name)
    np.testing.assert_allclose(call(name, x=x), UNARY[name](_wide(x)).numpy(), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (5,), (3, 1, 1)])
def test_binary_broadcasts(call, rng, name: str, shape: tuple[int, ...]) -> None:
    x, y = (np.round(_values(rng, name, s) * 4) / 4 for s in ((2, 3, 4, 5), shape))
    y = np.where(y == 0, np.float32(0.75), y).astype(np.float32)  # division by zero is not the subject here
    np.testing.assert_allclose(call(name, x=x, y=y), BINARY[name](_wide(x), _wide(y)).numpy(), rtol=1e-6, atol=1e-6)


def test_integer_division_floors_and_modulo_takes_the_divisors_sign(call) -> None:
    x, y = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    assert call("floor_div", x=x, y=y).tolist() == [3, -4, -4, 3]
    assert call("mod", x=x, y=y).tolist() == [1, 1, -1, -1]
    assert call("pow", x=np.array([2, 3]), y=np.array([10, 3])).tolist() == [1024, 27]


@pytest.mark.parametrize(
    "name,constants,oracle", WITH_CONSTANTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(WITH_CONSTANTS)]
)
def test_with_constants(call, rng, name: str, constants: dict, oracle) -> None:
    x = _values(rng, name)
    bound = {k: v if isinstance(v, str) else np.float32(v) if k != "axis" else v for k, v in constants.items()}
    np.testing.assert_allclose(call(name, x=x, **bound), oracle(_wide(x)).numpy(), rtol=5e-6, atol=2e-6)


def test_activations_survive_large_inputs(call) -> None:
    x = np.array([-1e4, 1e4], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        assert call("sigmoid", x=x).tolist() == [0.0, 1.0]
        assert call("silu", x=x).tolist() == [0.0, 1e4]
        assert call("softplus", x=x).tolist() == [0.0, 1e4]
        assert call("softmax", x=x).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", REDUCE)
@pytest.mark.parametrize("axes", [None, (1,), (-1, 0), (0, 1, 2)])
@pytest.mark.parametrize("keep", [False, True])
def test_reductions(call, rng, name: str, axes: tuple[int, ...] | None, keep: bool) -> None:
    x = np.abs(_values(rng, name, (2, 3, 4))) + np.float32(0.1)
    expected = REDUCE[name](_wide(x), tuple(range(3)) if axes is None else axes, keep)
    got = call(name, x=x, axes=None if axes is None else np.array(axes, np.int32), keep_dims=keep)
    assert got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_a_long_sum_keeps_its_small_terms(call) -> None:
    """A float32 running sum of 2^24 + many ones stops growing; float64 sums do not."""
    x = np.concatenate([[np.float32(2**24)], np.ones(1000, np.float32)])
    assert float(call("reduce_sum", x=x)) == 2**24 + 1000


def test_argmax_takes_the_first_of_equals(call) -> None:
    x = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]], np.float32)
    assert call("reduce_argmax", x=x, axis=-1).tolist() == [1, 0]
    assert call("reduce_argmin", x=x, axis=0, keep_dims=True).tolist() == [[0, 1, 1]]
    assert call("reduce_argmax", x=x, output_dtype="uint16").dtype == np.uint16


def test_log_sum_exp_of_nothing_is_minus_infinity(call) -> None:
    assert call("reduce_log_sum_exp", x=np.full((2, 3), -np.inf, np.float32), axes=[1]).tolist() == [-math.inf] * 2


def test_cast_truncates_towards_zero_and_saturates(call) -> None:
    x = np.array([2.7, -2.7, 1e20, -1e20, np.nan], np.float32)
    assert call("cast", x=x, dtype="int32").tolist() == [2, -2, 2**31 - 1, -(2**31), 0]
    assert call("cast", x=x[:2], dtype="bool").tolist() == [True, True]
    assert call("cast", x=np.float32(0.1), dtype="fp16").dtype == np.float16


def test_erf_at_the_ends(call) -> None:
    x = np.array([-40.0, -6.0, 0.0, 1e-6, 5.9999, np.inf, np.nan], np.float32)
    expected = [math.erf(float(v)) for v in x]
    np.testing.assert_allclose(call("erf", x=x), expected, rtol=1e-6, atol=0)
