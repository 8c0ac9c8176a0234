"""MLX as a second oracle for what decoders spend their time in: norms, attention, convolution, activations."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")


def _draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _close(got: np.ndarray, expected) -> None:
    np.testing.assert_allclose(got, np.array(expected), rtol=2e-5, atol=2e-5)


def test_norms(call, rng) -> None:
    x, gamma, beta = _draw(rng, 2, 3, 16) * 5, _draw(rng, 16), _draw(rng, 16)
    epsilon = np.float32(1e-5)
    expected = mx.fast.layer_norm(mx.array(x), mx.array(gamma), mx.array(beta), 1e-5)
    _close(call("layer_norm", x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=epsilon), expected)
    doubled = call("layer_norm", x=np.concatenate([x, -x], axis=-1), axes=[2], epsilon=epsilon)[..., :16]
    _close(doubled * gamma, mx.fast.rms_norm(mx.array(x), mx.array(gamma), 1e-5))


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_with_grouped_heads(call, rng, heads: int) -> None:
    """The op has no groups: programs repeat the keys first, as MLX does inside."""
    q, k, v = _draw(rng, 1, 4, 3, 8), _draw(rng, 1, heads, 5, 8), _draw(rng, 1, heads, 5, 8)
    mask = np.triu(np.full((3, 5), -1e4, np.float32), 3)
    expected = mx.fast.scaled_dot_product_attention(
        mx.array(q), mx.array(k), mx.array(v), scale=8**-0.5, mask=mx.array(mask)
    )
    k, v = (np.repeat(t, 4 // heads, axis=1) for t in (k, v))
    _close(call("scaled_dot_product_attention", query=q, key=k, value=v, attn_mask=mask), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution(call, rng, groups: int) -> None:
    x, w = _draw(rng, 2, 4, 7, 6), _draw(rng, 8, 4 // groups, 3, 2)
    expected = mx.conv2d(
        mx.array(x.transpose(0, 2, 3, 1)), mx.array(w.transpose(0, 2, 3, 1)), (2, 1), (1, 0), (1, 2), groups
    )
    got = call(
        "conv",
        x=x,
        weight=w,
        strides=[2, 1],
        pad_type="custom",
        pad=[1, 1, 0, 0],
        dilations=[1, 2],
        groups=groups,
    )
    _close(got, np.array(expected).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name,oracle", [("silu", nn.silu), ("sigmoid", nn.sigmoid), ("gelu", nn.gelu)])
def test_activations(call, rng, name: str, oracle) -> None:
    x = _draw(rng, 3, 50) * 4
    _close(call(name, x=x), oracle(mx.array(x)))
