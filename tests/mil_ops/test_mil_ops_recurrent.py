"""Recurrent layers against torch's, in every direction."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
STEPS, BATCH, IN, HIDDEN = 4, 2, 3, 5


def _parts(layer, suffix: str, order: list[int]) -> tuple[np.ndarray, ...]:
    """Torch's weights with their gates in Core ML's order: (w_ih, w_hh, b_ih, b_hh)."""

    def arranged(name: str) -> np.ndarray:
        gates = np.split(getattr(layer, name).detach().numpy().astype(np.float32), len(order))
        return np.concatenate([gates[i] for i in order])

    return tuple(arranged(f"{kind}_l0{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


def _inputs(rng: np.random.Generator, width: int = 1) -> tuple[np.ndarray, ...]:
    shapes = ((STEPS, BATCH, IN), (BATCH, width * HIDDEN), (BATCH, width * HIDDEN))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def _both(array: np.ndarray):
    """[B, 2H] as torch's [2, B, H]."""
    return torch.tensor(np.stack(np.split(array, array.shape[1] // HIDDEN, axis=1)))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_one_direction(call, rng, kind: str, direction: str, whole: bool) -> None:
    torch.manual_seed(3)
    x, h, c = _inputs(rng)
    steps = torch.tensor(x[::-1].copy() if direction == "reverse" else x)
    layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](IN, HIDDEN)
    order = {"rnn": [0], "gru": [0, 2, 1], "lstm": [0, 1, 3, 2]}[kind]
    w_ih, w_hh, b_ih, b_hh = _parts(layer, "", order)
    bias = {"bias": b_hh, "input_bias": b_ih, "reset_after": True} if kind == "gru" else {"bias": b_ih + b_hh}
    start = {"initial_h": h, "initial_c": c} if kind == "lstm" else {"initial_h": h}
    got = call(kind, x=x, weight_ih=w_ih, weight_hh=w_hh, direction=direction, output_sequence=whole, **start, **bias)
    state = (torch.tensor(h)[None], torch.tensor(c)[None]) if kind == "lstm" else torch.tensor(h)[None]
    outputs, last = layer(steps, state)
    expected = [outputs if whole else outputs[-1:], *([s[0] for s in last] if kind == "lstm" else [last[0]])]
    for value, oracle in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, oracle.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_bidirectional_lstm(call, rng, whole: bool) -> None:
    torch.manual_seed(4)
    x, h, c = _inputs(rng, 2)
    layer = torch.nn.LSTM(IN, HIDDEN, bidirectional=True)
    weights = {}
    for suffix, name in (("", ""), ("_reverse", "_back")):
        w_ih, w_hh, b_ih, b_hh = _parts(layer, suffix, [0, 1, 3, 2])
        weights |= {f"weight_ih{name}": w_ih, f"weight_hh{name}": w_hh, f"bias{name}": b_ih + b_hh}
    got = call("lstm", x=x, initial_h=h, initial_c=c, direction="bidirectional", output_sequence=whole, **weights)
    outputs, (last_h, last_c) = layer(torch.tensor(x), (_both(h), _both(c)))
    ends = torch.cat([outputs[-1, :, :HIDDEN], outputs[0, :, HIDDEN:]], -1)[None]
    for value, oracle in zip(
        got, [outputs if whole else ends, *(torch.cat([*s], -1) for s in (last_h, last_c))], strict=True
    ):
        np.testing.assert_allclose(value, oracle.detach().numpy(), atol=2e-6)


def test_gru_resets_before_the_product_by_default(call, rng) -> None:
    """Core ML's default differs from torch: o sees W (r h), not r (W h + b). One step, by hand."""
    x, h, _ = _inputs(rng)
    w_ih, w_hh, b = (rng.standard_normal(s).astype(np.float32) for s in ((15, IN), (15, HIDDEN), (15,)))
    gates = x[0] @ w_ih.T + b
    r = 1 / (1 + np.exp(-(gates[:, :5] + h @ w_hh[:5].T)))
    z = 1 / (1 + np.exp(-(gates[:, 10:] + h @ w_hh[10:].T)))
    o = np.tanh(gates[:, 5:10] + (r * h) @ w_hh[5:10].T)
    got, _ = call("gru", x=x[:1], initial_h=h, weight_ih=w_ih, weight_hh=w_hh, bias=b)
    np.testing.assert_allclose(got[0], (1 - z) * o + z * h, atol=2e-6)


def test_lstm_peephole_and_clip(call, rng) -> None:
    """One step by hand: the output gate peeps at the new, clipped cell."""
    x, h, c = _inputs(rng)
    w_ih, w_hh, p = (rng.standard_normal(s).astype(np.float32) for s in ((20, IN), (20, HIDDEN), (15,)))
    i, f, o, z = np.split(x[0] @ w_ih.T + h @ w_hh.T, 4, axis=1)
    p_i, p_f, p_o = np.split(p, 3)
    gate = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    cell = np.clip(gate(f + c * p_f) * c + gate(i + c * p_i) * np.tanh(z), -0.3, 0.3)
    _, last, memory = call(
        "lstm", x=x[:1], initial_h=h, initial_c=c, weight_ih=w_ih, weight_hh=w_hh, peephole=p, clip=np.float32(0.3)
    )
    assert np.abs(cell).max() == pytest.approx(0.3)
    np.testing.assert_allclose(memory, cell, atol=2e-6)
    np.testing.assert_allclose(last, gate(o + cell * p_o) * np.tanh(cell), atol=2e-6)
