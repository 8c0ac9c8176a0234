"""Does a bundle say what MLX says? Greedy tokens, their distributions, and the first layer that parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ane.convert.bundle import Manifest, read_manifest
from ane.convert.progress import Progress
from mlxkd import compat
from mlxkd.decode.mlx_session import MlxSession

KL_LIMIT = 1e-3  # nats per token, between float16 programs and MLX in float32 on the same numbers
LAYER_LIMIT = 0.02  # relative error of a layer's output that rounding does not explain


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Args:
        steps: greedy tokens compared; agreeing: how many were the same.
        kl_max: largest KL(MLX || bundle) of a step, nats; None where the bundle's head gives the argmax only.
        first: first step whose token differs or whose KL exceeds the limit; None when all agree.
        layer: first layer whose output differs by more than rounding at that step; None when none does.
        layer_error: its relative error.
    """

    steps: int
    agreeing: int
    kl_max: float | None
    first: int | None
    layer: int | None
    layer_error: float | None

    @property
    def passed(self) -> bool:
        """Every token the same, every distribution within the limit."""
        return self.first is None

    def text(self) -> str:
        """Two lines for a person."""
        kl = "no KL (an argmax head)" if self.kl_max is None else f"KL at most {self.kl_max:.2e} nats"
        lines = [f"greedy tokens: {self.agreeing} of {self.steps} identical to MLX, {kl}"]
        if self.first is not None:
            place = "no layer differs by more than rounding"
            if self.layer is not None:
                place = f"layer {self.layer} differs first (relative error {self.layer_error:.3f})"
            lines.append(f"first divergence at step {self.first}: {place}")
        return "\n".join(lines)


class Tap:
    """A decoder layer that remembers its last output; everything else is the layer's own."""

    def __init__(self, layer: nn.Module):
        self._layer, self.output = layer, mx.zeros(0)

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        self.output = self._layer(*args, **options)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def reference(folder: Path, batch: int = 1) -> MlxSession:
    """MLX in float32 on the numbers of a float16 bundle."""
    model, config = compat.load_model(folder)

    def rounded(value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.float16).astype(mx.float32) if floating else value

    model.update(tree_map(rounded, model.parameters()))
    return MlxSession(model, config, batch_size=batch)


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Largest KL(expected || got) over the last axis, nats; zero probabilities of the bundle's argmax head count."""
    p, q = _log_softmax(expected), _log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).max())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(
    model: str | Path, bundle: str | Path, steps: int, *, start: int | None = None, progress: Progress | None = None
) -> Check:
    """Decode ``steps`` greedy tokens with MLX and with the bundle on the reference runtime, side by side.

    Args:
        model: the folder the bundle was made from.
        start: first token; the tokenizer's beginning-of-text token, or 0, by default.
        progress: told of every token.
    """
    from ane.runtime import open_session

    folder = compat.resolve_model(model)
    manifest = read_manifest(bundle)
    steps, progress = min(steps, manifest.context), progress or Progress()
    progress.start(steps)
    progress.stage("comparing with MLX")
    rows = manifest.batches[0]  # where there is no batch of one, every row gets the same tokens
    theirs, ours = reference(folder), open_session(bundle, "mil", rows)
    token = start if start is not None else _beginning(folder, manifest)
    fed, agreeing, first = [token], 0, None
    worst: float | None = None
    for step in range(steps):
        expected = np.array(theirs.extend(np.array([[token]])))[0, -1]
        got = ours.extend(np.full((rows, 1), token))[0, -1]
        token = int(expected.argmax())
        same = int(got.argmax()) == token
        agreeing += same
        if manifest.head == "logits":
            worst = max(worst or 0.0, divergence(expected, got))
        if first is None and (not same or (worst or 0.0) > KL_LIMIT):
            first = step
        fed.append(token)
        progress.advance(1)
    layer, error = (None, None) if first is None else _first_layer(folder, Path(bundle), manifest, fed[: first + 1])
    return Check(steps, agreeing, worst, first, layer, error)


def _beginning(folder: Path, manifest: Manifest) -> int:
    config = compat.load_config(folder)
    token = config.get("bos_token_id")
    return token if isinstance(token, int) and 0 <= token < manifest.model.vocab else 0


def _first_layer(folder: Path, bundle: Path, manifest: Manifest, tokens: list[int]) -> tuple[int | None, float | None]:
    """The first layer whose output for the last of these tokens is off, and its relative error."""
    from ane.runtime.bundle_session import BundleSession

    theirs = reference(folder)
    taps = [Tap(layer) for layer in theirs.model.model.layers]
    theirs.model.model.layers = taps
    runners = [TracedPackage(bundle / package.file) for package in manifest.packages]
    rows = manifest.batches[0]
    ours = BundleSession(bundle, manifest, runners, rows)
    for token in tokens:
        theirs.extend(np.array([[token]]))
        ours.extend(np.full((rows, 1), token))
    outputs: dict[int, np.ndarray] = {}
    for runner in runners:
        outputs |= runner.layers
    for index, tap in enumerate(taps):
        expected = np.array(tap.output.astype(mx.float32)).ravel()
        error = float(np.linalg.norm(outputs[index][0].ravel() - expected) / (np.linalg.norm(expected) + 1e-12))
        if error > LAYER_LIMIT:
            return index, error
    return None, None


class TracedPackage:
    """A package on the reference runtime that keeps the outputs of its layers; see `ane.runtime.bundle_session`."""

    def __init__(self, path: Path):
        from ane.runtime.mil_session import MilPackage

        self._inner = MilPackage(path)
        self.layers: dict[int, np.ndarray] = {}

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any | None) -> Mapping[str, np.ndarray]:
        trace = self._inner.package.function(function).trace(inputs, state)
        for entry in trace.entries:
            kind, _, number = entry.name.rpartition("_")
            if kind == "layer" and number.isdigit() and entry.value is not None:
                self.layers[int(number)] = entry.value
        outputs: Mapping[str, np.ndarray] = trace.outputs
        return outputs

    def make_state(self, function: str) -> Any:
        return self._inner.make_state(function)

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return self._inner.read_state(state, name)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        self._inner.write_state(state, name, value)
