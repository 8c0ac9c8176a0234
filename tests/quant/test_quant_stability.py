"""The probe sees what quantisation does, and limits act on it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_quant_identity import LLAMA, TOKENS, llama, same, train

from mlxkd.errors import UserError
from mlxkd.quant import attach, attached, changed_codes, pack, plan_for
from mlxkd.quant.pictures import stability_sections
from mlxkd.quant.probe import cosine, relative_error, trace
from mlxkd.quant.stability import Guard, Limit, Probe, clipped_shares


def test_trace_is_the_model_itself() -> None:
    """Hidden states against a hand-written forward; entropy against the attention of a torch softmax."""
    torch = pytest.importorskip("torch")
    model = llama()
    seen = trace(model, TOKENS)
    assert same(seen.logits, model(TOKENS))
    x = model.model.embed_tokens(TOKENS)
    for i, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(x)
        attention = layer.self_attn
        q = attention.rope(attention.q_proj(normed).reshape(2, 9, 4, 32).transpose(0, 2, 1, 3))
        k = attention.rope(attention.k_proj(normed).reshape(2, 9, 2, 32).transpose(0, 2, 1, 3))
        q, k = torch.tensor(np.array(q)), torch.tensor(np.array(k)).repeat_interleave(2, 1)
        scores = (q @ k.transpose(-1, -2)) * 32**-0.5
        p = scores.masked_fill(~torch.tril(torch.ones(9, 9, dtype=torch.bool)), -torch.inf).softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean()
        assert seen.entropy[i] == pytest.approx(float(entropy), rel=1e-4)
        x = layer(x, "causal", None)
        np.testing.assert_allclose(np.array(seen.hidden[i]), np.array(x), atol=1e-6)


def test_figures_are_closed_forms() -> None:
    a, b = mx.array([[[3.0, 4.0], [1.0, 0.0]]]), mx.array([[[4.0, 3.0], [0.0, 2.0]]])
    assert cosine(a, b) == pytest.approx((24 / 25 + 0) / 2)
    assert relative_error(a, b) == pytest.approx(np.sqrt((1 + 1 + 1 + 4) / 26))


def test_fewer_bits_look_worse_and_flips_are_counted() -> None:
    figures = {}
    for bits in (8, 4, 2):
        model = llama()
        probe = Probe(model, TOKENS)
        attach(model, plan_for(model, f"mlx-affine{bits}-g32"))
        first = probe.look(model, LLAMA, 0)
        before = pack(model, LLAMA)
        train(model, steps=2)
        second = probe.look(model, LLAMA, 2)
        assert first.figure("flips_per_step") is None
        assert second.figure("flips_per_step") == changed_codes(before, pack(model, LLAMA)) / 2 > 0
        figures[bits] = (first.figure("min_cosine"), -first.figure("max_relative_error"))
    assert figures[8] > figures[4] > figures[2]
    assert figures[8][0] > 0.999


def test_clipped_share_counts_weights_beyond_the_ends() -> None:
    model = llama()
    attach(model, plan_for(model, "ane-int8"), learned_ranges=True)
    assert max(clipped_shares(model).values()) == 0
    layer = model.model.layers[0].mlp.up_proj
    layer.qat_default_scales = layer.qat_default_scales / 2  # the ends now lie at half the largest magnitude
    ends = np.abs(np.array(layer.weight)).max(1) / 2
    expected = (np.abs(np.array(layer.weight)) > ends[:, None] * 127.5 / 127).mean()
    assert clipped_shares(model)["model.layers.0.mlp.up_proj"] == pytest.approx(expected, abs=2e-3)


def broken(model: object) -> None:
    layer = next(iter(attached(model).values()))
    layer.weight = layer.weight * mx.array(float("nan"))


def test_a_nan_rolls_back_lowers_the_rate_and_says_so() -> None:
    model, guard = llama(), Guard()
    probe = Probe(model, TOKENS)
    attach(model, plan_for(model, "mlx-affine4-g32"))
    good = model(TOKENS)
    assert guard.check(probe.look(model, LLAMA, 10), model, "moments").action is None
    broken(model)
    decision = guard.check(probe.look(model, LLAMA, 20), model)
    assert decision.action == "roll_back" and decision.rate_factor == 0.5
    assert "step 20: non_finite" in decision.reasons[0] and "roll back" in decision.reasons[0]
    assert "of step 10 again" in decision.reasons[-1]
    assert same(model(TOKENS), good) and guard.good_state[2] == "moments"


def test_limits_choose_the_strongest_action_and_patience_ends() -> None:
    model = llama()
    probe = Probe(model, TOKENS)
    attach(model, plan_for(model, "mlx-affine2-g32"))
    seen = probe.look(model, LLAMA, 1)
    guard = Guard([Limit("min_cosine", 1.1, "lower_rate"), Limit("max_relative_error", 1e-6, "lower_rate")], patience=1)
    assert guard.check(seen, model).action == "lower_rate"
    assert guard.check(seen, model).action == "stop"  # out of patience
    assert Guard([Limit("min_cosine", 1.1, "stop")]).check(seen, model).action == "stop"
    assert Guard([Limit("min_cosine", 1.1, "roll_back")]).check(seen, model).action == "stop"  # nothing to go back to
    with pytest.raises(UserError, match="never stable"):
        _ = Guard().good_state


def test_limits_name_what_they_know() -> None:
    with pytest.raises(UserError, match="unknown stability measure 'cosine'"):
        Limit("cosine", 0.5, "stop")
    with pytest.raises(UserError, match="unknown action 'halt'"):
        Limit("min_cosine", 0.5, "halt")


def test_report_sections_draw() -> None:
    from mlxkd.report.document import Document

    model = llama()
    probe = Probe(model, TOKENS)
    attach(model, plan_for(model, "mlx-affine4-g32"))
    history = [probe.look(model, LLAMA, step) for step in (0, 1)]
    page = Document("t", stability_sections(history, ["step 1: rolled back"])).html()
    assert page.count("<svg") >= 5 and "step 1: rolled back" in page and "entropy, deployed" in page
    assert stability_sections([]) == []
