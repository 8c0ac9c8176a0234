"""Recurrent layers over x[steps, batch, input]. Gate orders are Core ML's: lstm i, f, o, z; gru r, o, z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane.mil.ops._functions import RECURRENT
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _activation(ctx: OpContext, name: str) -> Callable[[Array], Array]:
    if name not in RECURRENT:
        raise ctx.fault(f"recurrent activation {name!r} is not one of {', '.join(sorted(RECURRENT))}")
    return RECURRENT[name]


def _directed(ctx: OpContext, x: Array, direction: str) -> Array:
    """The steps in the order they are taken; a reverse layer also returns them in that order."""
    if direction not in ("forward", "reverse"):
        raise ctx.fault(f"direction {direction!r} is not forward or reverse")
    return x[::-1] if direction == "reverse" else x


def _inputs(ctx: OpContext, x: Array, weight: Array, bias: Any) -> Array:
    """The part of every gate that depends on the input only, all steps at once: [steps, batch, gates * H]."""
    flat = ctx.xp.matmul(x.reshape(-1, x.shape[-1]), np.swapaxes(weight, 0, 1))
    gates = flat.reshape(*x.shape[:2], -1)
    return gates if bias is None else gates + bias


def _sequence(states: list[Array], whole: bool) -> Array:
    return np.stack(states if whole else states[-1:])


@op("rnn", versions=("ios15", "ios17"))
def rnn(
    ctx: OpContext,
    *,
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Array, Array]:
    """h_t = act(W_ih x_t + W_hh h_{t-1} + b). Returns (all or last h[steps, batch, H], last h)."""
    act, h, states = _activation(ctx, activation), initial_h, []
    recurrent = np.swapaxes(weight_hh, 0, 1)
    for gate in _inputs(ctx, _directed(ctx, x, direction), weight_ih, bias):
        h = act(gate + h @ recurrent)
        states.append(h)
    return _sequence(states, bool(output_sequence)), h


@op("gru", versions=("ios15", "ios17", "ios18"))
def gru(
    ctx: OpContext,
    *,
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Any = None,
) -> tuple[Array, Array]:
    """h_t = (1 - z) o + z h_{t-1}, with o from W_ho (r h) or, ``reset_after``, r (W_ho h + b).

    ``bias`` belongs to the hidden side; before ios18 the input side has none of its own.
    """
    gate_act, act = _activation(ctx, recurrent_activation), _activation(ctx, activation)
    hidden = weight_hh.shape[1]
    w_r, w_o, w_z = (np.swapaxes(w, 0, 1) for w in np.split(weight_hh, 3))
    b_r, b_o, b_z = np.zeros((3, hidden), np.float32) if bias is None else np.split(bias, 3)
    h, states = initial_h, []
    for gates in _inputs(ctx, _directed(ctx, x, direction), weight_ih, input_bias):
        x_r, x_o, x_z = np.split(gates, 3, axis=-1)
        r = gate_act(x_r + h @ w_r + b_r)
        z = gate_act(x_z + h @ w_z + b_z)
        o = act(x_o + (r * (h @ w_o + b_o) if reset_after else (r * h) @ w_o + b_o))
        h = (1 - z) * o + z * h
        states.append(h)
    return _sequence(states, bool(output_sequence)), h


@dataclass(frozen=True)
class _Cell:
    """One direction of an LSTM."""

    weight_ih: Array
    weight_hh: Array
    bias: Any
    peephole: Any
    acts: tuple[Callable[[Array], Array], ...]  # of the gates, of the cell, of the output
    clip: Any

    def run(self, ctx: OpContext, x: Array, h: Array, c: Array) -> tuple[list[Array], Array]:
        """Hidden states in the order of the steps of x, and the last cell state."""
        p_i, p_f, p_o = (0.0, 0.0, 0.0) if self.peephole is None else np.split(self.peephole, 3)
        recurrent, states = np.swapaxes(self.weight_hh, 0, 1), []
        act_gate, act_cell, act_out = self.acts
        for gates in _inputs(ctx, x, self.weight_ih, self.bias):
            i, f, o, z = np.split(gates + h @ recurrent, 4, axis=-1)
            i, f = act_gate(i + c * p_i), act_gate(f + c * p_f)
            c = f * c + i * act_cell(z)
            if self.clip is not None:
                c = np.clip(c, -self.clip, self.clip)
            h = act_gate(o + c * p_o) * act_out(c)
            states.append(h)
        return states, c


@op("lstm", versions=("ios15", "ios17"))
def lstm(
    ctx: OpContext,
    *,
    x: Array,
    initial_h: Array,
    initial_c: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    peephole: Any = None,
    weight_ih_back: Any = None,
    weight_hh_back: Any = None,
    bias_back: Any = None,
    peephole_back: Any = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Any = None,
) -> tuple[Array, Array, Array]:
    """c_t = f c_{t-1} + i act(z); h_t = o act(c_t). Returns (h of all steps or the last, last h, last c).

    Bidirectional layers hold both directions side by side in the last axis; the backward one is returned in the
    order of x, and its last step is the first of x.
    """
    acts = tuple(_activation(ctx, name) for name in (recurrent_activation, cell_activation, activation))
    forward = _Cell(weight_ih, weight_hh, bias, peephole, acts, clip)
    if direction != "bidirectional":
        states, c = forward.run(ctx, _directed(ctx, x, direction), initial_h, initial_c)
        return _sequence(states, bool(output_sequence)), states[-1], c
    hidden = weight_hh.shape[1]
    backward = _Cell(weight_ih_back, weight_hh_back, bias_back, peephole_back, acts, clip)
    ahead, c_ahead = forward.run(ctx, x, initial_h[:, :hidden], initial_c[:, :hidden])
    back, c_back = backward.run(ctx, x[::-1], initial_h[:, hidden:], initial_c[:, hidden:])
    last = np.concatenate([ahead[-1], back[-1]], axis=-1)
    everything = np.concatenate([np.stack(ahead), np.stack(back[::-1])], axis=-1)
    return everything if output_sequence else last[None], last, np.concatenate([c_ahead, c_back], axis=-1)
