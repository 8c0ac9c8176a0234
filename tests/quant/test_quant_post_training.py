"""Post-training baselines and mixed precision."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_quant_identity import LLAMA, TOKENS, llama, same

from mlxkd.compat import load_model
from mlxkd.errors import UserError
from mlxkd.quant import Packed, attach, changed_codes, load_student, save_student
from mlxkd.quant.baselines import post_training
from mlxkd.quant.propose import Choice, propose, sensitivities, within_budget

ROWS = np.random.default_rng(4).integers(0, 96, (8, 33)).astype(np.int32)


@pytest.mark.parametrize("method", ["rtn", "dwq", "awq", "gptq"])
def test_baselines_ship_and_reload(method: str, tmp_path: Path) -> None:
    model = llama(num_attention_heads=4, num_key_value_heads=4)
    config = {**LLAMA, "num_key_value_heads": 4}
    before = model(TOKENS)
    name = "mlx-affine4-g32" if method == "gptq" else "mlx-affine3-g32"
    packed = post_training(model, config, name, method, rows=ROWS, rate=1e-3)
    assert same(model(TOKENS), before)  # the float model is left alone
    rounded = post_training(model, config, name)
    assert set(packed.grids.values()) == {name}
    changed = {"rtn": 0, "dwq": 0}
    if method in changed:
        assert changed_codes(rounded, packed) == changed[method]
    assert same(packed.model(TOKENS), rounded.model(TOKENS)) == (method == "rtn")
    save_student(tmp_path / "s", packed, tmp_path)
    assert same(load_model(tmp_path / "s")[0](TOKENS), packed.model(TOKENS))
    assert changed_codes(packed, load_student(tmp_path / "s")) == 0


def test_dwq_lowers_the_divergence_it_trains_on() -> None:
    model = llama()
    rows = np.tile(ROWS, (10, 1))
    packed = post_training(model, LLAMA, "mlx-affine2-g32", "dwq", rows=rows, rate=3e-3)
    rounded = post_training(model, LLAMA, "mlx-affine2-g32")

    def distance(other: object) -> float:
        a, b = (m(mx.array(ROWS)) for m in (model, other))
        a, b = (v - mx.logsumexp(v, axis=-1, keepdims=True) for v in (a, b))
        return float(mx.mean(mx.sum(mx.exp(a) * (a - b), axis=-1)))

    assert distance(packed.model) < 0.8 * distance(rounded.model)


def test_fitted_ranges_round_closer_and_are_where_dwq_starts(tmp_path: Path) -> None:
    model = llama()
    plain, fitted = (post_training(model, LLAMA, "mlx-affine2-g32", fitted_ranges=wanted) for wanted in (False, True))

    def error(packed: Packed) -> float:
        found = 0.0
        for layer, ours in zip(model.layers, packed.model.layers, strict=True):
            q = ours.self_attn.q_proj
            decoded = mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=2)
            found += mx.sum(mx.square(decoded - layer.self_attn.q_proj.weight)).item()
        return found

    assert error(fitted) < 0.8 * error(plain)
    save_student(tmp_path / "s", fitted, tmp_path)
    assert same(load_model(tmp_path / "s")[0](TOKENS), fitted.model(TOKENS))
    tuned = post_training(model, LLAMA, "mlx-affine2-g32", "dwq", rows=ROWS, rate=1e-6, fitted_ranges=True)
    assert changed_codes(fitted, tuned) == 0 and changed_codes(plain, tuned) > 0


def test_dense_dwq_trains_what_the_kernels_train() -> None:
    model, rows = llama(), np.tile(ROWS, (3, 1))
    found = {}
    for execution in ("kernel", "dense"):
        packed = post_training(model, LLAMA, "mlx-affine3-g32", "dwq", rows=rows, rate=1e-3, execution=execution)
        assert {type(m).__name__ for m in packed.model.modules()} >= {"QuantizedLinear", "QuantizedEmbedding"}
        found[execution] = dict(tree_flatten(packed.model.parameters()))
    start = dict(tree_flatten(post_training(model, LLAMA, "mlx-affine3-g32").model.parameters()))
    for path, value in found["kernel"].items():
        if value.dtype == mx.uint32:
            assert same(value, found["dense"][path]), path
        else:
            moved = float(mx.max(mx.abs(value - start[path])))
            assert moved > 1e-3, path
            # Adam turns the rounding of a near-zero gradient into a step, so single entries may differ by one.
            assert float(mx.mean(mx.abs(value - found["dense"][path]))) < 0.02 * moved, path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("mlx-affine4-g32", "qat"), "unknown quantisation method 'qat'"),
        (("mlx-affine4-g32", "dwq"), "dwq needs calibration text"),
        (("mlx-nvfp4", "gptq"), "mlx-lm's GPTQ makes affine grids, not mlx-nvfp4"),
        (("mlx-affine3-g32", "gptq"), r"GPTQ packs \(2, 4, 8\) bits, not 3"),
        (("mlx-nvfp4", "dwq"), "DWQ trains affine scales and biases"),
        (("float", "gptq"), "makes one grid, not 0"),
    ],
)
def test_methods_name_what_they_cannot_do(arguments: tuple[str, str], text: str) -> None:
    rows = None if "needs" in text else ROWS
    with pytest.raises(UserError, match=text):
        post_training(llama(), LLAMA, *arguments, rows=rows)


def test_gptq_leaves_layers_float_and_awq_cannot(tmp_path: Path) -> None:
    config = {**LLAMA, "intermediate_size": 172}  # 172 is not divisible by 32
    model = llama(intermediate_size=172)
    packed = post_training(model, config, "mlx-affine4-g32|float", "gptq", rules=[("*embed*", "float")], rows=ROWS)
    kinds = {path: type(m).__name__ for path, m in packed.model.named_modules()}
    left = [path for path in kinds if "down_proj" in path or "embed" in path]
    assert left and {kinds[path] for path in left} == {"Linear", "Embedding"}
    assert set(packed.grids) == set(post_training(model, config, "mlx-affine4-g32|float").grids) - set(left)
    save_student(tmp_path / "s", packed, tmp_path)
    assert same(load_model(tmp_path / "s")[0](TOKENS), packed.model(TOKENS))
    with pytest.raises(UserError, match=r"AWQ quantises every layer and cannot leave float: .*0\.mlp\.down_proj"):
        post_training(model, config, "mlx-affine4-g32|float", "awq", rows=ROWS)
    with pytest.raises(UserError, match="GPTQ makes one grid, not 2"):
        post_training(model, config, "mlx-affine4-g32|float", "gptq", rules=[("*q_proj", "mlx-affine8-g32")], rows=ROWS)


def choices_of(rng: np.random.Generator, layers: int, convex: bool) -> list[Choice]:
    found = []
    for i in range(layers):
        bits = np.array([2.0, 3.0, 4.0, 8.0])
        drop = np.sort(rng.random(3))[::-1] * np.array([1, 0.4, 0.1]) if convex else rng.random(3)
        losses = np.concatenate([[0.0], -np.cumsum(drop)]) + drop.sum()
        found += [Choice(f"l{i}", f"g{b:g}", float(d), float(b), 100) for b, d in zip(bits, losses, strict=True)]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_near_the_exhaustive_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices, budget = choices_of(rng, 5, True), float(rng.uniform(2.2, 6))
    found = within_budget(choices, budget)
    by_layer = [[c for c in choices if c.layer == f"l{i}"] for i in range(5)]
    best = min(
        sum(c.divergence for c in pick)
        for pick in itertools.product(*by_layer)
        if sum(c.bits_per_weight for c in pick) / 5 <= budget
    )
    smallest = sum(c[0].divergence for c in by_layer)
    assert found.bits_per_weight <= budget + 1e-9
    assert best - 1e-12 <= found.divergence <= best + 0.25 * (smallest - best) + 1e-9


def test_a_proposal_fits_its_budget_and_beats_one_width() -> None:
    model = llama()
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = layer.weight * 20  # one layer that matters
    names = ("mlx-affine2-g32", "mlx-affine3-g32", "mlx-affine8-g32")
    before = {k: mx.array(v) for k, v in tree_flatten(model.parameters())}
    found = propose(model, [TOKENS], 4.2, names)
    assert all(same(v, before[k]) for k, v in tree_flatten(model.parameters()))
    assert 3.5 < found.bits_per_weight <= 4.2
    assert found.plan["model.layers.1.mlp.down_proj"] != "mlx-affine2-g32"
    uniform = sum(c.divergence for c in found.choices if c.grid == "mlx-affine3-g32")
    assert found.divergence < uniform
    assert attach(model, found.plan) is model


def test_sensitivity_is_the_divergence_of_one_rounded_layer() -> None:
    model = llama()
    found = {(c.layer, c.grid): c for c in sensitivities(model, [TOKENS], ["mlx-affine2-g32"])}
    path = "model.layers.0.mlp.up_proj"
    twin = llama()
    layer = twin.model.layers[0].mlp.up_proj
    layer.weight = mx.dequantize(*mx.quantize(layer.weight, 32, 2), 32, 2)
    p, q = (np.array(m(TOKENS)).astype(np.float64) for m in (model, twin))
    p, q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (p, q))
    assert found[path, "mlx-affine2-g32"].divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert found[path, "float"].bits_per_weight == 16


def test_a_budget_too_small_is_named_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"a budget of 1 bits per weight is below the smallest plan's 3\n"):
        propose(llama(), [], 1.0, ["mlx-affine2-g32"], on_layer=lambda done, total: pytest.fail("measured"))
    choices = [Choice("a", "mlx-affine2-g32", 0.1, 3.0, 8), Choice("a", "float", 0.0, 16.0, 8)]
    with pytest.raises(UserError, match="below the smallest plan's 3"):
        within_budget(choices, 2.9)


def test_sensitivity_over_batches_is_the_mean_of_their_tokens_and_is_told_layer_by_layer() -> None:
    model, told = llama(), list[tuple[int, int]]()
    parts = [TOKENS[:, :5], TOKENS[:, 3:6]]
    both = sensitivities(model, parts, ["mlx-affine2-g32"], lambda done, total: told.append((done, total)))
    alone = [sensitivities(model, [part], ["mlx-affine2-g32"]) for part in parts]
    assert [c.divergence for c in both] == pytest.approx(
        [(5 * a.divergence + 3 * b.divergence) / 8 for a, b in zip(*alone, strict=True)]
    )
    layers = sum(c.grid != "float" for c in both)
    with pytest.raises(ValueError, match="no batches"):
        sensitivities(model, [], ["mlx-affine2-g32"])
    assert told == [(i, 2 * layers) for i in range(1, 2 * layers + 1)]
