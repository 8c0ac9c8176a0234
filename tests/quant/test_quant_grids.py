"""Grids against independent arithmetic, and plans that name what is wrong."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_quant_identity import LLAMA, MLX_GRIDS, TOKENS, llama, same

from mlxkd.errors import UserError
from mlxkd.quant import attach, fake_weight, grid, names, pack, plan_for, quantisable
from mlxkd.quant.behaviour import backend_behaviour
from mlxkd.quant.bitpack import pack_codes, unpack_codes
from mlxkd.quant.grids import FLOAT

RNG = np.random.default_rng(7)


def weights(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def affine_by_hand(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """mx.quantize's rule in float32 NumPy: the end of larger magnitude lies exactly on the grid."""
    g = w.reshape(-1, group).astype(np.float32)
    low, high = g.min(1), g.max(1)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-7))
    low_is_edge = np.abs(low) > np.abs(high)
    scale = np.where(low_is_edge, scale, -scale)
    edge = np.where(low_is_edge, low, high)
    q0 = np.rint(edge / scale)
    scale = np.where(q0 != 0, edge / np.where(q0 != 0, q0, 1), scale).astype(np.float32)
    bias = np.where(q0 != 0, edge, 0).astype(np.float32)
    codes = np.clip(np.rint((g - bias[:, None]) / scale[:, None]), 0, 2**bits - 1)
    return codes.reshape(w.shape).astype(np.uint8)


@pytest.mark.parametrize("name", [n for n in MLX_GRIDS if "affine" in n])
def test_affine_codes_follow_the_published_rule(name: str) -> None:
    w = weights(16, 256)
    g = grid(name)
    codes = np.array(g.indices(g.encode(w, mx.float32)))
    assert np.mean(codes != affine_by_hand(np.array(w), g.bits, g.group)) < 1e-3  # last-bit differences at ties


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bit_stream_is_mlx_layout(bits: int) -> None:
    words, scales, biases = mx.quantize(weights(8, 128), 32, bits)
    codes = unpack_codes(words, bits)
    by_hand = codes.reshape(8, 4, 32).astype(mx.float32) * scales[..., None] + biases[..., None]
    assert same(by_hand.reshape(8, 128), mx.dequantize(words, scales, biases, 32, bits))
    assert same(pack_codes(codes, bits), words)


@pytest.mark.parametrize("name", MLX_GRIDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_fake_is_exactly_decode_of_encode_with_straight_gradient(name: str, dtype: mx.Dtype) -> None:
    g, w = grid(name), weights(8, 256)
    expected = mx.dequantize(*mx.quantize(w.astype(dtype), **g.packing), **g.packing, dtype=dtype)
    value, (gradient,) = mx.vjp(lambda v: g.fake(v, dtype), [w], [mx.ones((8, 256), dtype)])
    assert same(value[0], expected)
    assert same(gradient, mx.ones((8, 256)))


@pytest.mark.parametrize("name", ["mlx-affine4-g64", "mlx-affine3-g32", "mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"])
def test_kernel_linear_is_quantized_matmul_with_dense_gradients(name: str) -> None:
    g, w, x = grid(name), weights(32, 128), weights(3, 5, 128)
    cotangent = weights(3, 5, 32)
    (y,), (dx, dw) = mx.vjp(lambda a, b: g.fake_linear(a, b, mx.float32), [x, w], [cotangent])
    (dense,), (dx_dense, dw_dense) = mx.vjp(lambda a, b: a @ g.fake(b, mx.float32).T, [x, w], [cotangent])
    assert same(y, mx.quantized_matmul(x, *g.encode(w, mx.float32).values(), transpose=True, **g.packing))
    for ours, theirs in ((y, dense), (dx, dx_dense), (dw, dw_dense)):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-4)


def test_learned_ranges_have_the_published_gradients() -> None:
    """Closed forms of Esser et al. (1902.08153) in NumPy, with some weights clipped."""
    g, w = grid("mlx-affine3-g32"), weights(2, 64)
    ranges = {k: v * 0.6 for k, v in g.ranges(w).items()}  # narrower than the weights: some are clipped
    cotangent = weights(2, 64)

    def value(scales: mx.array, biases: mx.array) -> mx.array:
        return mx.sum(cotangent * g.fake(w, mx.float32, {"scales": scales, "biases": biases}))

    codes = np.array(g.indices(g.encode_with(w, ranges, mx.float32))).reshape(2, 2, 32).astype(np.float64)
    position = (np.array(w).reshape(2, 2, 32) - np.array(ranges["biases"])[..., None]) / np.array(ranges["scales"])[
        ..., None
    ]
    inside = (np.rint(position) >= 0) & (np.rint(position) <= 7)
    c = np.array(cotangent).reshape(2, 2, 32)
    assert 0.05 < 1 - inside.mean() < 0.9
    dscale, dbias = mx.grad(value, argnums=(0, 1))(ranges["scales"], ranges["biases"])
    np.testing.assert_allclose(np.array(dscale), (c * np.where(inside, codes - position, codes)).sum(-1), rtol=2e-3)
    np.testing.assert_allclose(np.array(dbias), (c * ~inside).sum(-1), rtol=1e-3, atol=1e-5)


def test_straight_through_and_clipping_match_torchao() -> None:
    """Forward values, and zero gradient for clipped weights only, by torch autograd."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    from torchao.quantization.qat.utils import _fake_quantize_per_channel_group

    g, w, cotangent = grid("mlx-affine4-g32"), weights(4, 64), weights(4, 64)
    scale = (np.abs(RNG.standard_normal((4, 2))) * 0.1 + 0.08).astype(np.float32)
    zero_point = RNG.integers(5, 10, (4, 2)).astype(np.float32)
    theirs_w = torch.tensor(np.array(w), requires_grad=True)
    theirs = _fake_quantize_per_channel_group(theirs_w, torch.tensor(scale), torch.tensor(zero_point), 0, 15, 32)
    theirs.backward(torch.tensor(np.array(cotangent)))
    ranges = {"scales": mx.array(scale), "biases": mx.array(-scale * zero_point)}
    (ours,), (gradient,) = mx.vjp(lambda v: g.fake(v, mx.float32, ranges), [w], [cotangent])
    np.testing.assert_allclose(np.array(ours), theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(np.array(gradient), theirs_w.grad.numpy(), rtol=1e-6)
    assert (theirs_w.grad == 0).any()  # some were clipped


def test_learned_ranges_start_on_the_grid_and_train() -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g32"), learned_ranges=True, execution="kernel")
    layer = model.model.layers[0].mlp.up_proj
    started = fake_weight(layer)
    np.testing.assert_allclose(
        np.array(started), np.array(grid("mlx-affine4-g32").fake(layer.weight, mx.float32)), atol=1e-6
    )
    _, gradients = nn.value_and_grad(model, lambda: nn.losses.cross_entropy(model(TOKENS), TOKENS).mean())()
    assert mx.abs(gradients["model"]["layers"][0]["mlp"]["up_proj"]["qat_default_scales"]).max() > 0
    assert same(pack(model, LLAMA).model(TOKENS), model(TOKENS))


def test_one_weight_constexpr_restores_the_weight() -> None:
    g, w = grid("mlx-affine4-g32"), weights(8, 64)
    codes = g.encode(w, mx.float16)
    made = g.constexpr(codes)
    data, scale, offset = (made.arrays[k].astype(np.float32) for k in ("data", "scale", "offset"))
    restored = scale[..., None] * (data.reshape(8, 2, 32) - offset[..., None])
    steps = np.abs(restored - np.array(g.decode(codes, mx.float32)).reshape(8, 2, 32)) / np.abs(scale)[..., None]
    assert made.op == "constexpr_blockwise_shift_scale" and steps.max() < 0.06


def test_blocks_of_one_value_stay_finite() -> None:
    """MLX gives them a scale near zero, and bias / scale is then beyond float16."""
    values = mx.array([[0.5, -0.03, 3.0], [0.0, 1e-3, -200.0]])
    w = mx.repeat(values, 32, axis=-1)
    for name in ("mlx-affine2-g32", "mlx-affine4-g32", "mlx-affine8-g32"):
        codes = grid(name).encode(w, mx.float16)
        data, scale, offset = (grid(name).constexpr(codes).arrays[k] for k in ("data", "scale", "offset"))
        restored = scale.repeat(32, -1).astype(np.float32) * (data.astype(np.float32) - offset.repeat(32, -1))
        np.testing.assert_allclose(restored, np.array(w), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in names() if name != FLOAT])
def test_the_form_of_a_constexpr_is_known_without_codes(name: str) -> None:
    shape = (32, 256)
    made, form = grid(name).constexpr(grid(name).encode(weights(*shape), mx.float16)), grid(name).constexpr_form(shape)
    assert (made.op, made.bits) == (form.op, form.bits)
    assert {k: (v.shape, v.dtype) for k, v in made.arrays.items()} == {
        k: (v.shape, v.dtype) for k, v in form.arrays.items()
    }
    assert all(not any(array.strides) for array in form.arrays.values())


def test_names_of_layers_that_do_not_fit() -> None:
    model = llama(intermediate_size=172)
    with pytest.raises(UserError) as caught:
        plan_for(model, "mlx-affine4-g32")
    text = str(caught.value)
    assert "2 of 15 layers do not fit" in text and "model.layers.0.mlp.down_proj" in text
    assert "width 172 is not divisible by 32" in text and "mlx-affine4-g32|float" in text
    plan = plan_for(model, "mlx-affine4-g32|float")
    assert [path for path, name in plan.items() if name == "float"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_quantised_students_are_refused() -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g64"))
    with pytest.raises(UserError, match=r"quantised already \(15 layers, first .*\n.*float weights"):
        quantisable(pack(model, LLAMA).model)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: plan_for(m, "mlx-affine4-g63"), "unknown grid 'mlx-affine4-g63'"),
        (lambda m: plan_for(m, "mlx-nvfp4", [("*.nothing", "float")]), r"no quantisable layer matches \*.nothing"),
        (lambda m: attach(m, {"lm_head": "mlx-nvfp4"}), "layers that the model has not: lm_head"),
        (lambda m: pack(m, LLAMA), "nothing to pack"),
    ],
)
def test_mistakes_are_named(call: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        call(llama())


def test_behaviour_of_this_backend_is_recorded() -> None:
    found = backend_behaviour()
    assert found["ties"] in ("half to even", "half away from zero")
    if mx.default_device().type == mx.DeviceType.cpu:  # read in mlx's source, notes of 0.32.4
        assert found == {
            "ties": "half to even",
            "one_sign_groups": "range of the group",
            "half_decode": "two roundings",
        }


def test_every_name_resolves_to_itself() -> None:
    assert [grid(name).name for name in names()[1:]] == list(names()[1:])
