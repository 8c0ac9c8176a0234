"""Ranges first, codes after; several targets; adapters; activations."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_quant_identity import LLAMA, TOKENS, llama, same, train

from mlxkd.compat import load_model
from mlxkd.errors import UserError
from mlxkd.quant import activate, attach, attached, changed_codes, detach, grid, pack, plan_for, save_student
from mlxkd.quant.activations import fake_activations
from mlxkd.quant.activations import names as activation_names
from mlxkd.quant.phases import Phase, enter, hold, interleave, phase_at, phases, release, settle

HOLDABLE = ["mlx-affine4-g32", "mlx-affine3-g64", "ane-int8", "ane-lut3", "ane-lut4-gc8"]


@pytest.mark.parametrize("name", HOLDABLE)
@pytest.mark.parametrize("execution", ["auto", "kernel"])
def test_held_codes_rest_while_ranges_train(name: str, execution: str) -> None:
    if execution == "kernel" and name.startswith("ane"):
        pytest.skip("no kernel for this grid")
    model = llama()
    attach(model, plan_for(model, name), learned_ranges=True, execution=execution)
    hold(model)
    before = pack(model, LLAMA)
    trainable = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert not any(path.endswith(".weight") and "norm" not in path for path in trainable)
    assert any("qat_default_" in path for path in trainable) and not any("held" in path for path in trainable)
    train(model, steps=4)
    held = pack(model, LLAMA)
    assert changed_codes(before, held) == 0
    assert not same(before.model(TOKENS), held.model(TOKENS))
    if execution == "kernel":
        assert same(model(TOKENS), held.model(TOKENS))
    release(model)
    if "lut" not in name:  # entries that crossed while held come back in order: other codes, same weights
        assert changed_codes(held, pack(model, LLAMA)) == 0
    assert same(pack(model, LLAMA).model(TOKENS), held.model(TOKENS))
    train(model, steps=2)
    assert changed_codes(held, pack(model, LLAMA)) > 0


@pytest.mark.parametrize("name", HOLDABLE)
def test_held_gradients_are_those_of_decoding(name: str) -> None:
    """Directional finite differences: with codes fixed, decoding is linear in the ranges."""
    g, rng = grid(name), np.random.default_rng(3)
    w = mx.array(rng.standard_normal((16, 128)).astype(np.float32))
    ranges = g.ranges(w)
    codes = g.encode_with(w, ranges, mx.float32)
    ranges = {k: codes[k].astype(mx.float32) for k in g.range_names}
    fixed = {k: v for k, v in codes.items() if k not in g.range_names}
    cotangent = mx.array(rng.standard_normal(w.shape).astype(np.float32))

    def value(*r: mx.array) -> mx.array:
        return mx.sum(cotangent * g.held(fixed, dict(zip(g.range_names, r, strict=True)), mx.float32))

    starts = tuple(ranges.values())
    _, gradients = mx.vjp(value, list(starts), [mx.array(1.0)])
    for i, gradient in enumerate(gradients):
        step = 0.125 if name.startswith("ane") else 0.01
        nudge = step * mx.sign(mx.array(rng.standard_normal(starts[i].shape).astype(np.float32)))
        moved = [s + nudge if j == i else s for j, s in enumerate(starts)]
        actual = nudge if name.startswith("mlx") else (moved[i].astype(mx.float16) - starts[i].astype(mx.float16))
        expected = float(mx.sum(gradient * actual.astype(mx.float32)))
        tolerance = 2e-3 if name.startswith("mlx") else 2e-2  # float16 rounding of decoded values
        found = float(value(*moved) - value(*starts))
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance * float(mx.sum(mx.abs(gradient))) * step)


def test_small_float_grids_have_nothing_to_hold() -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-nvfp4"), learned_ranges=True)
    with pytest.raises(UserError, match=r"nothing would train in .*self_attn.*\n.*learned_ranges=True"):
        hold(model)


def test_phases_cover_the_run() -> None:
    plan = phases(1000, share=0.4, targets=("w8", "w4"), ranges_first=0.25)
    assert plan == (
        Phase(0, None),
        Phase(600, "w8", "ranges"),
        Phase(650, "w8"),
        Phase(800, "w4", "ranges"),
        Phase(850, "w4"),
    )
    assert [phase_at(plan, s).start for s in (0, 599, 600, 799, 999)] == [0, 0, 600, 650, 850]
    assert phases(10, share=1.0) == (Phase(0, "default"),)
    with pytest.raises(UserError, match=r"share 0 must lie in"):
        phases(10, share=0)


def test_progressive_run_through_its_phases() -> None:
    model = llama()
    for bits in (8, 4):
        attach(model, plan_for(model, f"mlx-affine{bits}-g32"), target=f"w{bits}", learned_ranges=True)
    floats = dict(tree_flatten(llama().parameters()))
    for phase in phases(6, share=0.5, targets=("w8", "w4"), ranges_first=0.34):
        enter(model, phase)
        if phase.target is None:
            assert same(model(TOKENS), llama()(TOKENS))
        train(model, steps=1)
    packed = pack(model, LLAMA)
    assert set(packed.grids.values()) == {"mlx-affine4-g32"}
    detach(model)
    assert {path for path, _ in tree_flatten(model.parameters())} == set(floats)


def test_interleaving_layers_mixes_targets_in_one_step() -> None:
    model = llama()
    for name in ("mlx-affine4-g32", "ane-lut4"):
        attach(model, plan_for(model, name), target=name)
    interleave(model, ["mlx-affine4-g32", "ane-lut4"], 0, by="layer")
    first = [m.qat.active for m in attached(model).values()]
    interleave(model, ["mlx-affine4-g32", "ane-lut4"], 1, by="layer")
    assert first[:2] == ["mlx-affine4-g32", "ane-lut4"]
    assert all(a != m.qat.active for a, m in zip(first, attached(model).values(), strict=True))
    train(model, steps=1)
    for name in ("mlx-affine4-g32", "ane-lut4"):
        assert set(pack(model, LLAMA, target=name).grids.values()) == {name}


def test_differentiable_palettes_train_soft_and_ship_hard(tmp_path: Path) -> None:
    model = llama()
    attach(model, plan_for(model, "ane-lut2"), tau=1e-4)
    model.train()
    soft = model(TOKENS)
    train(model, steps=2)
    palette = mx.array(model.model.layers[0].mlp.up_proj.qat_default_palette)
    settle(model)
    assert not same(palette, model.model.layers[0].mlp.up_proj.qat_default_palette)
    packed = pack(model, LLAMA)
    assert not same(soft, packed.model(TOKENS))
    assert len(np.unique(np.array(packed.model.model.layers[0].mlp.up_proj.weight))) <= 4
    model.eval()
    assert same(model(TOKENS), packed.model(TOKENS))
    save_student(tmp_path / "s", packed, tmp_path)
    assert same(load_model(tmp_path / "s")[0](TOKENS), packed.model(TOKENS))


@pytest.mark.parametrize("execution", ["kernel", "dense"])
def test_adapters_train_on_the_merged_tensor_and_ship_it(execution: str, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama()
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    adapter = model.model.layers[0].self_attn.q_proj
    plan = plan_for(model, "mlx-affine4-g32")
    assert "model.layers.0.self_attn.q_proj" in plan and not any("linear" in path for path in plan)
    attach(model, plan, execution=execution)
    train(model, steps=3)
    assert float(mx.abs(adapter.lora_b).max()) > 0
    packed = pack(model, LLAMA)
    theirs = adapter.fuse()  # mlx-lm's own merge
    codes = packed.codes["model.layers.0.self_attn.q_proj"]
    for ours, merged in zip(codes.values(), mx.quantize(theirs.weight, 32, 4), strict=True):
        assert same(ours, merged)
    save_student(tmp_path / "s", packed, tmp_path)
    plain = load_model(tmp_path / "s")[0]
    assert same(plain(TOKENS), packed.model(TOKENS))
    if execution == "kernel":
        assert same(model(TOKENS), packed.model(TOKENS))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QATLoRALinear"  # packing left it alone


def test_int8_activations_match_torchao() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    from torchao.quantization.qat.fake_quantize_config import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    x = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))(torch.tensor(x))
    ours = fake_activations(mx.array(x), "int8-token")
    assert np.mean(np.abs(np.array(ours) - theirs.numpy()) > 1e-5) < 0.005  # ties fall either way
    gradient = mx.grad(lambda v: mx.sum(fake_activations(v, "int8-token") * mx.array(x)))(mx.array(x))
    np.testing.assert_array_equal(np.array(gradient), x)


@pytest.mark.parametrize("name", activation_names())
def test_activations_reach_the_training_forward(name: str) -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine8-g32"))
    weights_only = model(TOKENS)
    detach(model)
    attach(model, plan_for(model, "mlx-affine8-g32"), activations=name)
    assert not same(model(TOKENS), weights_only)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(weights_only), atol=1.0)
    _, gradients = nn.value_and_grad(model, lambda: model(TOKENS).sum())()
    assert all(bool(mx.isfinite(v).all()) for _, v in tree_flatten(gradients))


def test_activation_widths_are_checked() -> None:
    model = llama(intermediate_size=172)
    with pytest.raises(UserError, match=r"activations on mxfp8 do not fit the input of .*down_proj: width 172"):
        attach(model, plan_for(model, "ane-int8"), activations="mxfp8")
    with pytest.raises(UserError, match="unknown activation grid 'int9'"):
        attach(model, plan_for(model, "ane-int8"), activations="int9")
    activate(detach(model), None)
