"""Pruned students: against hand-cut computation, and through mlx-lm's own loader."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kd_toys import toy

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.students import importance
from mlxkd.students.prune import depth, width

TOKENS = mx.array([[1, 5, 9, 2]])


def test_depth_skips_the_other_layers() -> None:
    model, config = toy(num_hidden_layers=4)
    small, small_config = depth(model, config, [0, 3])
    h = model.model.embed_tokens(TOKENS)
    for layer in (model.layers[0], model.layers[3]):
        h = layer(h, mask="causal")
    expected = model.model.embed_tokens.as_linear(model.model.norm(h))
    assert np.allclose(small(TOKENS), expected, atol=1e-6)
    assert small_config["num_hidden_layers"] == 2 and config["num_hidden_layers"] == 4


def test_depth_keeps_the_kinds_of_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model, config = toy(layer_types=kinds, sliding_window=2)
    small, small_config = depth(model, config, [1, 2])
    assert small_config["layer_types"] == kinds[1:]
    assert [layer.use_sliding for layer in small.layers] == [True, False]


def test_width_equals_the_model_with_the_rest_zeroed() -> None:
    """A channel or head that is cut away contributes what a zeroed output weight contributes: nothing."""
    model, config = toy()
    channels = [[0, 3, 5, 7], [1, 2, 3, 23], [8, 9, 10, 11]]
    groups = [[1], [0], [1]]
    small, small_config = width(model, config, channels=channels, groups=groups)
    for layer, kept, (group,) in zip(model.layers, channels, groups, strict=True):
        down, out = np.array(layer.mlp.down_proj.weight), np.array(layer.self_attn.o_proj.weight)
        down[:, [i for i in range(24) if i not in kept]] = 0
        out[:, slice(8, 16) if group == 0 else slice(0, 8)] = 0
        layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight = mx.array(down), mx.array(out)
    assert np.allclose(small(TOKENS), model(TOKENS), atol=1e-5)
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [small_config[key] for key in keys] == [4, 2, 1, 4]


def test_a_pruned_student_is_a_normal_folder(stories_model, tmp_path) -> None:
    model, config = compat.load_model(stories_model)
    small, small_config = depth(model, config, [0, 2, 4])
    small, small_config = width(small, small_config, channels=[range(96)] * 3, groups=[[0, 2]] * 3)
    compat.save_model_folder(tmp_path / "student", small, small_config, stories_model)
    loaded, _, _ = compat.load(tmp_path / "student")
    assert np.allclose(loaded(TOKENS), small(TOKENS), atol=1e-5)


def test_pruning_shares_nothing_that_training_changes() -> None:
    model, config = toy()
    before = np.array(model(TOKENS))
    small, _ = depth(model, config, [0, 1])
    small.model.embed_tokens.weight = small.model.embed_tokens.weight * 0
    assert np.array_equal(model(TOKENS), before)


@pytest.mark.parametrize(
    "cut, message",
    [
        (lambda m, c: depth(m, c, [2, 1]), r"ascending numbers from 0 to 2, not \[2, 1\]"),
        (lambda m, c: depth(m, c, [0, 3]), "ascending numbers from 0 to 2"),
        (lambda m, c: depth(m, c, []), "ascending numbers"),
        (lambda m, c: depth(m, c | {"sliding_window_pattern": 3}, [0, 2]), "every 3th layer of this family attends"),
        (lambda m, c: width(m, c, channels=[[0, 1]] * 2), "for each of the 3 layers, not 2"),
        (lambda m, c: width(m, c, channels=[[0, 1], [0], [0, 1]]), "every layer must keep equally many channels"),
        (lambda m, c: width(m, c, channels=[[0, 0]] * 3), "equally many channels, each once"),
        (lambda m, c: width(m, c, groups=[[2]] * 3), "groups are numbered 0 to 1"),
    ],
)
def test_refusals(cut, message) -> None:
    model, config = toy()
    with pytest.raises(UserError, match=message):
        cut(model, config)


def test_quantised_weights_are_refused() -> None:
    model, config = toy(hidden_size=32, head_dim=8, intermediate_size=32)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(UserError, match="a quantised model cannot be pruned"):
        depth(model, config, [0])


def test_block_influence_is_one_minus_the_cosine_of_input_and_output() -> None:
    model, _ = toy()
    tokens = np.random.default_rng(0).integers(1, 37, (3, 7)).astype(np.int32)
    expected, h = [], model.model.embed_tokens(mx.array(tokens))
    for layer in model.layers:
        after = layer(h, mask="causal")
        a, b = np.array(h), np.array(after)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        expected.append(1 - cosine.mean())
        h = after
    assert importance.block_influence(model, tokens) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert type(model.model.layers[0]).__name__ == "TransformerBlock"
    idle = model.model.layers[1]
    idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight = (
        mx.zeros_like(w) for w in (idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight)
    )
    assert importance.block_influence(model, tokens)[1] == pytest.approx(0, abs=1e-6)
    assert importance.deepest_layers(model, tokens, 2) == [0, 2]


def test_idle_heads_go_first() -> None:
    model, config = toy()
    tokens = np.random.default_rng(0).integers(1, 37, (2, 6)).astype(np.int32)
    for layer, idle in zip(model.layers, (0, 1, 0), strict=True):
        rows = np.ones((8, 1), np.float32)  # two KV heads of width 4
        rows[4 * idle : 4 * idle + 4] = 1e-3
        layer.self_attn.v_proj.weight = layer.self_attn.v_proj.weight * mx.array(rows)
    kept = importance.attention_groups(model, tokens, 2, 1)
    assert kept == [[1], [0], [1]]
    pruned, pruned_config = width(model, config, groups=kept)
    assert pruned_config["num_key_value_heads"] == 1 and pruned_config["num_attention_heads"] == 2
    assert np.isfinite(np.array(pruned(mx.array(tokens)))).all()
