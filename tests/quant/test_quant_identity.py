"""What is evaluated in training is what ships, to the bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxkd.compat import build_model, load_model
from mlxkd.errors import UserError
from mlxkd.quant import (
    activate,
    attach,
    changed_codes,
    detach,
    fake_weight,
    grid,
    load_student,
    names,
    pack,
    plan_for,
    save_student,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
}
TOKENS = mx.array(np.random.default_rng(0).integers(0, 96, (2, 9)).astype(np.int32))
MLX_GRIDS = [name for name in names() if name.startswith("mlx-")]


def llama(seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: object) -> nn.Module:
    mx.random.seed(seed)
    model = build_model({**LLAMA, **changes})
    model.set_dtype(dtype)
    return model


def train(model: nn.Module, steps: int = 2, *, compiled: bool = False, checkpointed: bool = False) -> None:
    """A few AdamW steps of next-token loss on the fake-quantised forward."""
    forward = model
    layers = [nn.utils.checkpoint(layer) for layer in model.model.layers] if checkpointed else None
    optimizer = optim.AdamW(learning_rate=1e-2)

    def loss(tokens: mx.array) -> mx.array:
        if layers is None:
            logits = forward(tokens)
        else:
            hidden = model.model.embed_tokens(tokens)
            for layer in layers:
                hidden = layer(hidden, "causal", None)
            hidden = model.model.norm(hidden)
            logits = model.model.embed_tokens.as_linear(hidden)
        return nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()

    def step(tokens: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(tokens)
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state]
    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for _ in range(steps):
        mx.eval(run(TOKENS), state)


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b))


@pytest.mark.parametrize("name", MLX_GRIDS)
@pytest.mark.parametrize("fast", [False, True])  # compiled and checkpointed; their product is tested on one grid below
def test_training_evaluation_equals_the_reloaded_student(name: str, fast: bool, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    attach(model, plan_for(model, name), execution="kernel", learned_ranges=fast)
    train(model, compiled=fast, checkpointed=fast)
    in_training = model(TOKENS)  # the training forward itself, deployed kernels inside
    packed = pack(model, {**LLAMA, "num_hidden_layers": 1})
    evaluated = packed.model(TOKENS)
    save_student(tmp_path / "student", packed, tmp_path)
    plain, config = load_model(tmp_path / "student")  # mlx-lm's own loader, which knows nothing of mlxkd
    assert same(in_training, evaluated)
    assert same(plain(TOKENS), evaluated)
    if fast:
        assert same(mx.compile(model)(TOKENS), mx.compile(plain)(TOKENS))
    assert config["quantization"]["mode"] == grid(name).packing["mode"]
    assert changed_codes(packed, load_student(tmp_path / "student")) == 0


@pytest.mark.parametrize("name", ["mlx-affine4-g64", "mlx-affine3-g32", "mlx-mxfp4"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_students_reload_to_the_bit(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    model = llama()
    attach(model, plan_for(model, name), dtype=dtype, execution="dense")
    train(model)
    packed = pack(model, LLAMA)
    save_student(tmp_path / "student", packed, tmp_path)
    plain, _ = load_model(tmp_path / "student")
    assert same(plain(TOKENS), packed.model(TOKENS))
    assert {v.dtype for _, v in tree_flatten(plain.parameters())} <= {dtype, mx.uint32, mx.uint8}
    model.set_dtype(dtype)  # masters cast as the step of a half-precision loop casts them
    assert same(fake_weight(model.model.embed_tokens), grid(name).decode(packed.codes["model.embed_tokens"], dtype))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("execution", ["kernel", "dense"])
def test_compile_and_checkpoint_keep_identity(compiled: bool, checkpointed: bool, execution: str) -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g32"), execution=execution)
    train(model, compiled=compiled, checkpointed=checkpointed)
    packed = pack(model, LLAMA)
    if execution == "kernel":
        assert same(model(TOKENS), packed.model(TOKENS))
        assert same(mx.compile(model)(TOKENS), mx.compile(packed.model)(TOKENS))
    for path, codes in packed.codes.items():
        module = dict(model.named_modules())[path]
        assert same(fake_weight(module), grid("mlx-affine4-g32").decode(codes, mx.float32)), path


def test_training_moves_the_codes_that_ship() -> None:
    """Guards the identity tests: they would also pass if training never reached the grid."""
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g64"))
    before = pack(model, LLAMA)
    train(model)
    assert changed_codes(before, pack(model, LLAMA)) > 100


def test_packing_equals_mlx_lm_and_leaves_masters_and_randomness_alone() -> None:
    from mlx_lm.utils import quantize_model

    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g64"))
    key = mx.array(mx.random.state[0])
    masters = {k: mx.array(v) for k, v in tree_flatten(model.trainable_parameters())}
    packed = pack(model, LLAMA)
    assert same(key, mx.random.state[0])
    assert all(same(v, masters[k]) for k, v in tree_flatten(model.trainable_parameters()))
    theirs, config = quantize_model(llama(), dict(LLAMA), 64, 4)
    assert {k: v.dtype for k, v in tree_flatten(theirs.parameters())} == {
        k: v.dtype for k, v in tree_flatten(packed.model.parameters())
    }
    for path, value in tree_flatten(theirs.parameters()):
        assert same(value, dict(tree_flatten(packed.model.parameters()))[path]), path
    assert config["quantization"] == packed.config["quantization"]


def test_mixed_plan_survives_mlx_lm(tmp_path: Path) -> None:
    model = llama()
    rules = [("*.mlp.down_proj", "float"), ("*.mlp.*", "mlx-affine3-g32"), ("*embed*", "mlx-affine8-g32")]
    attach(model, plan_for(model, "mlx-mxfp4", rules), execution="kernel")
    train(model)
    packed = pack(model, LLAMA)
    save_student(tmp_path / "s", packed, tmp_path)
    plain, _ = load_model(tmp_path / "s")
    assert same(plain(TOKENS), model(TOKENS))
    assert isinstance(plain.model.layers[0].mlp.down_proj, nn.Linear)
    assert plain.model.layers[1].mlp.up_proj.bits == 3
    assert plain.model.embed_tokens.bits == 8


@pytest.mark.parametrize("execution", ["kernel", "dense"])
def test_experts_and_untied_heads(execution: str, tmp_path: Path) -> None:
    mx.random.seed(0)
    model = build_model(MOE)
    plan = plan_for(model, "mlx-affine4-g32")
    assert plan["model.layers.0.mlp.switch_mlp.up_proj"] == "mlx-affine4-g32"
    assert plan["model.layers.0.mlp.gate"] == "mlx-affine8-g64"  # qwen3_moe's own quant_predicate
    attach(model, plan, execution=execution)
    expert = model.model.layers[0].mlp.switch_mlp.up_proj
    before = mx.array(expert.weight)
    train(model)
    assert not mx.array_equal(before, expert.weight)
    packed = pack(model, MOE)
    save_student(tmp_path / "s", packed, tmp_path)
    plain, _ = load_model(tmp_path / "s")
    assert same(plain(TOKENS), packed.model(TOKENS))
    if execution == "kernel":
        assert same(model(TOKENS), packed.model(TOKENS))


def test_expert_kernel_and_dense_gradients_agree() -> None:
    gradients = []
    for execution in ("kernel", "dense"):
        mx.random.seed(0)
        model = build_model(MOE)
        attach(model, plan_for(model, "mlx-affine4-g32"), execution=execution)
        _, tree = nn.value_and_grad(model, lambda m=model: nn.losses.cross_entropy(m(TOKENS), TOKENS).mean())()
        gradients.append(dict(tree_flatten(tree)))
    for path, value in gradients[0].items():
        np.testing.assert_allclose(np.array(value), np.array(gradients[1][path]), atol=2e-6, rtol=2e-3, err_msg=path)


def test_detach_gives_the_float_model_back() -> None:
    model, untouched = llama(), llama()
    classes = [type(m) for _, m in untouched.named_modules()]
    attach(model, plan_for(model, "mlx-affine2-g32"), learned_ranges=True)
    assert not mx.array_equal(model(TOKENS), untouched(TOKENS))
    detach(model)
    assert [type(m) for _, m in model.named_modules()] == classes
    assert same(model(TOKENS), untouched(TOKENS))


def test_another_model_of_the_same_class_stays_float() -> None:
    model, teacher = llama(), llama()
    before = teacher(TOKENS)
    attach(model, plan_for(model, "mlx-affine2-g32"))
    assert same(teacher(TOKENS), before)


def test_several_targets_share_one_master(tmp_path: Path) -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g64"), target="gpu", execution="kernel")
    attach(model, plan_for(model, "mlx-nvfp4"), target="fp4", execution="kernel")
    train(model)
    for target in ("gpu", "fp4", None):
        activate(model, target)
        in_training = model(TOKENS)
        if target:
            packed = pack(model, LLAMA)
            save_student(tmp_path / target, packed, tmp_path)
            assert same(load_student(tmp_path / target).model(TOKENS), in_training)
    assert same(in_training, detach(model)(TOKENS))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "mlxkd.json").unlink(), "not a packed student: mlxkd.json is missing"),
        (lambda f: (f / "mlxkd.json").write_text("{"), r"mlxkd\.json: cannot be read as a student's description"),
        (lambda f: (f / "mlxkd.json").write_text("[]"), "cannot be read as a student's description"),
        (lambda f: (f / "mlxkd.json").write_text('{"format": 9}'), "format 9 is not 1"),
        (lambda f: (f / "mlxkd.json").write_text('{"format": 1}'), "KeyError.*grids"),
        (
            lambda f: (f / "mlxkd.json").write_text(
                '{"format": 1, "dtype": "float32", "grids": {"model.norm": "mlx-mxfp4"}}'
            ),
            r"the weights hold no codes of model\.norm \(mlx-mxfp4\)",
        ),
        (lambda f: (f / "codes.safetensors").unlink(), r"codes\.safetensors: no codes of .*\(ane-lut4\)\nhint: copy"),
    ],
)
def test_a_damaged_student_is_named(damage: object, text: str, tmp_path: Path) -> None:
    model = llama()
    attach(model, plan_for(model, "mlx-affine4-g64", [("*q_proj", "ane-lut4")]))
    save_student(tmp_path / "s", pack(model, LLAMA), tmp_path)
    damage(tmp_path / "s")
    with pytest.raises(UserError, match=text):
        load_student(tmp_path / "s")
