"""Products, convolutions, pools, norms and attention against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _t(x: Any):
    return torch.tensor(np.asarray(x)).double()


def _close(got: np.ndarray, expected: Any, tolerance: float = 5e-6) -> None:
    assert got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got, expected.numpy(), rtol=tolerance, atol=tolerance)


def _draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_linear_and_matmul(call, rng) -> None:
    x, w, b = _draw(rng, 2, 3, 4), _draw(rng, 5, 4), _draw(rng, 5)
    _close(call("linear", x=x, weight=w, bias=b), F.linear(_t(x), _t(w), _t(b)))
    y = _draw(rng, 2, 3, 6)
    _close(call("matmul", x=x, y=y, transpose_x=True), _t(x).mT @ _t(y))
    _close(call("matmul", x=x, y=x, transpose_y=True), _t(x) @ _t(x).mT)
    assert call("matmul", x=np.array([1, 2], np.int32), y=np.array([[3], [2**30]], np.int32)).tolist() == [-(2**31) + 3]


def test_einsum_broadcasts_ones(call, rng) -> None:
    x, y = _draw(rng, 2, 3, 1, 4), _draw(rng, 1, 4, 5, 6)
    got = call("einsum", values=(x, y), equation="nchw,nwhu->nchu")
    _close(got, torch.einsum("nchw,nwhu->nchu", _t(x).expand(2, 3, 5, 4), _t(y).expand(2, 4, 5, 6)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride,dilation,pad", [(1, 1, 0), (2, 1, 1), (1, 2, 2)])
def test_conv_and_its_transpose(call, rng, rank: int, groups: int, stride: int, dilation: int, pad: int) -> None:
    x = _draw(rng, 2, 4, *(6, 5, 5)[:rank])
    w, b = _draw(rng, 6, 4 // groups, *(3, 2, 2)[:rank]), _draw(rng, 6)
    geometry = {
        "strides": [stride] * rank,
        "dilations": [dilation] * rank,
        "groups": groups,
        "pad_type": "custom",
        "pad": [pad] * (2 * rank),
    }
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    _close(call("conv", x=x, weight=w, bias=b, **geometry), conv(_t(x), _t(w), _t(b), stride, pad, dilation, groups))
    w = _draw(rng, 4, 6 // groups, *(3, 2, 2)[:rank])
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    expected = transposed(_t(x), _t(w), _t(b), stride, pad, 0, groups, dilation)
    _close(call("conv_transpose", x=x, weight=w, bias=b, **geometry), expected)


def test_conv_transpose_reaches_a_given_output_shape(call, rng) -> None:
    x, w = _draw(rng, 1, 3, 4, 4), _draw(rng, 3, 2, 3, 3)
    expected = F.conv_transpose2d(_t(x), _t(w), None, 2, 1, 1)
    got = call(
        "conv_transpose",
        x=x,
        weight=w,
        strides=[2, 2],
        pad_type="custom",
        pad=[1] * 4,
        output_shape=np.array(expected.shape),
    )
    _close(got, expected)


@pytest.mark.parametrize("size,stride", [(7, 2), (8, 2), (5, 1), (6, 3)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_same_padding_keeps_the_ceiling_and_puts_the_odd_pad_where_it_says(
    call, rng, size: int, stride: int, kernel: int
) -> None:
    x, w = _draw(rng, 1, 2, size), _draw(rng, 2, 2, kernel)
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    small, large = total // 2, total - total // 2
    for pad_type, pads in (("same", (small, large)), ("same_lower", (large, small))):
        expected = F.conv1d(F.pad(_t(x), pads), _t(w), None, stride)
        assert expected.shape[-1] == -(-size // stride)
        _close(call("conv", x=x, weight=w, strides=[stride], pad_type=pad_type), expected)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("kernel,stride,pad", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1)])
def test_pools(call, rng, kernel: int, stride: int, pad: int, ceil: bool) -> None:
    x = _draw(rng, 2, 3, 7, 8)
    geometry: dict[str, Any] = {
        "kernel_sizes": [kernel] * 2,
        "strides": [stride] * 2,
        "pad_type": "custom",
        "pad": [pad] * 4,
        "ceil_mode": ceil,
    }
    _close(call("max_pool", x=x, **geometry), F.max_pool2d(_t(x), kernel, stride, pad, 1, ceil))
    for exclude in (False, True):
        got = call("avg_pool", x=x, exclude_padding_from_average=exclude, **geometry)
        _close(got, F.avg_pool2d(_t(x), kernel, stride, pad, ceil, not exclude))
    squares = F.avg_pool2d(F.pad(_t(x), (pad,) * 4).square(), kernel, stride, 0, ceil, divisor_override=1)
    if not ceil:
        _close(call("l2_pool", x=x, **geometry), squares.sqrt())


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 4)])
def test_norms(call, rng, shape: tuple[int, ...]) -> None:
    x = _draw(rng, *shape) * 3 + 1
    gamma, beta = _draw(rng, 6), _draw(rng, 6)
    instance = F.instance_norm(_t(x), weight=_t(gamma), bias=_t(beta), eps=1e-3)
    _close(call("instance_norm", x=x, gamma=gamma, beta=beta, epsilon=np.float32(1e-3)), instance, 1e-5)
    mean, variance = _draw(rng, 6), np.abs(_draw(rng, 6)) + np.float32(0.1)
    batch = F.batch_norm(_t(x), _t(mean), _t(variance), _t(gamma), _t(beta), eps=1e-5)
    _close(call("batch_norm", x=x, mean=mean, variance=variance, gamma=gamma, beta=beta), batch, 1e-5)
    weight, bias = _draw(rng, *shape[2:]), _draw(rng, *shape[2:])
    layer = F.layer_norm(_t(x), shape[2:], _t(weight), _t(bias), 1e-5)
    axes = list(range(2, len(shape)))
    _close(call("layer_norm", x=x, axes=axes, gamma=weight, beta=bias, epsilon=np.float32(1e-5)), layer, 1e-5)
    lrn = F.local_response_norm(_t(x), 3, 0.5, 0.75, 2.0)
    got = call("local_response_norm", x=x, size=3, alpha=np.float32(0.5), beta=np.float32(0.75), k=np.float32(2))
    _close(got, lrn)


def test_layer_norm_over_channels_of_a_bc1s_tensor(call, rng) -> None:
    """RMSNorm as the layer norm of [x, -x]: the mean is zero, so the variance is the mean square."""
    x = _draw(rng, 1, 8, 1, 3) * 100
    got = call("layer_norm", x=np.concatenate([x, -x], axis=1), axes=[1], epsilon=np.float32(1e-5))[:, :8]
    _close(got, F.rms_norm(_t(x).permute(0, 2, 3, 1), (8,), eps=1e-5).permute(0, 3, 1, 2), 1e-6)


def test_l2_norm(call, rng) -> None:
    x = _draw(rng, 2, 3, 4, 5)
    _close(call("l2_norm", x=x), _t(x) / (_t(x).square().sum((1, 2, 3), keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(call, rng, mask: str | None) -> None:
    q, k, v = _draw(rng, 2, 3, 4, 8), _draw(rng, 2, 3, 6, 8), _draw(rng, 2, 3, 6, 5)
    given: Any = None
    if mask == "bool":
        given = rng.random((4, 6)) < 0.7
        given[:, 0] = True
    elif mask == "float":
        given = _draw(rng, 2, 1, 4, 6)
    oracle = None if given is None else torch.tensor(given) if mask == "bool" else _t(given)
    expected = F.scaled_dot_product_attention(_t(q), _t(k), _t(v), oracle)
    _close(call("scaled_dot_product_attention", query=q, key=k, value=v, attn_mask=given), expected, 1e-5)
