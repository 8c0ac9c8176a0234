"""Split a language model into backbone (tokens to hidden states) and head (hidden states to logits).

About twenty mlx-lm families scale or cap their logits around the head. The split is therefore tested against
the model itself before anything trusts it, and a family that it would get wrong is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.errors import UserError

BACKBONES = ("model", "transformer", "backbone")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embeddings", "embedding", "embeddings")
PROBE_LOGIT = 60.0  # large enough that a soft-cap of 15 to 50 cannot hide


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: ``cap * tanh(scale * module(h) / cap)``, the cap only where the family has one.

    Args:
        module: the output projection, or the embedding when it is tied.
        tied: whether ``module`` is the input embedding.
        scale: factor on the raw logits.
        softcap: cap, or None.
    """

    module: nn.Module
    tied: bool
    scale: float = 1.0
    softcap: float | None = None

    def raw(self, hidden: mx.array) -> mx.array:
        """The projection alone; [..., D] to [..., V] in the dtype of the model."""
        product: mx.array = self.module.as_linear(hidden) if self.tied else self.module(hidden)
        return product

    def shape_logits(self, raw: mx.array) -> mx.array:
        """Scale and cap, in float32."""
        z = raw.astype(mx.float32)
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * mx.tanh(z / self.softcap)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Logits in float32."""
        return self.shape_logits(self.raw(hidden))

    @property
    def rows(self) -> int:
        """Output size, padding of the vocabulary included."""
        return int(self.module.weight.shape[0])


class Split:
    """A model as backbone and head.

    Args:
        model: an mlx-lm model; nothing of it is changed.
        verify: run the check; switch it off only for a model of a kind already checked.
        streams: the rows of a batch are computed side by side on these (``runtime.row_streams``); None: all on one.

    Raises:
        UserError: no head(backbone(x)) equals model(x) for this family.
    """

    def __init__(self, model: nn.Module, *, verify: bool = True, streams: Sequence[mx.Stream] | None = None):
        self.model = model
        self.streams = streams or (mx.default_stream(mx.default_device()),)
        self.owner, name = _locate(model)
        self.backbone: Any = getattr(self.owner, name)
        candidates = list(_heads(self.owner, self.backbone))
        was_training = model.training
        model.eval()  # dropout would make two forward passes differ
        self.head = self._verified(name, candidates) if verify else candidates[0]
        model.train(was_training)

    @property
    def head_weight(self) -> mx.array:
        """The head's weight, packed when quantised."""
        weight: mx.array = self.head.module.weight
        return weight

    @property
    def width(self) -> int:
        """Size D of the hidden states that enter the head."""
        return int(self.hidden(mx.array([[0]])).shape[-1])

    def hidden(self, inputs: mx.array) -> mx.array:
        """Post-norm hidden states [B, S, D] of token ids [B, S]."""
        if len(self.streams) == 1 or len(inputs) < len(self.streams):
            states: mx.array = self.backbone(inputs)
            return states
        count = len(self.streams)
        rows = mx.split(inputs, [len(inputs) * i // count for i in range(1, count)])
        parts = []
        for stream, part in zip(self.streams, rows, strict=True):
            with mx.stream(stream):
                parts.append(self.backbone(part))
        return mx.concatenate(parts)

    def states(self, inputs: mx.array, layers: Sequence[int]) -> tuple[mx.array, list[mx.array]]:
        """Hidden states as ``hidden`` gives them, and the outputs [B, S, D] of chosen layers (-1: those states).

        Raises:
            UserError: a layer that does not exist, or a family whose layers return more than their states.
        """
        blocks = self.backbone.layers
        if any(not -1 <= i < len(blocks) for i in layers):
            raise UserError(f"layers are numbered 0 to {len(blocks) - 1}, or -1, not {list(layers)}", where="hidden")
        found: dict[int, list[Any]] = {}
        self.backbone.layers = [_Recorder(b, i, found) if i in layers else b for i, b in enumerate(blocks)]
        try:
            final = self.hidden(inputs)
        finally:
            self.backbone.layers = blocks
        found[-1] = [final]
        if any(not isinstance(part, mx.array) for i in layers for part in found.get(i, [None])):
            raise _refusal(self.model, "its layers return more than hidden states")
        return final, [mx.concatenate(found[i]) if len(found[i]) > 1 else found[i][0] for i in layers]

    def _verified(self, name: str, candidates: list[Head]) -> Head:
        tokens = mx.array([[1, 2, 3, 5, 7, 4, 2, 6]]) % candidates[0].rows
        hidden, full = self.hidden(tokens), self.model(tokens)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3:
            raise _refusal(self.model, "its backbone does not return hidden states")
        for head in candidates:
            if _close(head(hidden), full) and self._agrees_at_large_logits(name, head, hidden, tokens):
                return head
        raise _refusal(
            self.model, "head(backbone(x)) differs from model(x); it scales or caps its logits in its own way"
        )

    def _agrees_at_large_logits(self, name: str, head: Head, hidden: mx.array, tokens: mx.array) -> bool:
        """Feed enlarged hidden states to the model's own head code: small logits would not show a soft-cap."""
        peak = float(mx.abs(head.raw(hidden)).max()) * abs(head.scale)
        large = (hidden * (PROBE_LOGIT / max(peak, 1e-6))).astype(hidden.dtype)
        setattr(self.owner, name, _Fixed(self.backbone, large))
        try:
            full = self.model(tokens)
        finally:
            setattr(self.owner, name, self.backbone)
        return _close(head(large), full)


class _Recorder:
    """Stands in for a layer and keeps what it returns, call by call."""

    def __init__(self, layer: nn.Module, number: int, found: dict[int, list[Any]]):
        self._layer, self._kept = layer, found.setdefault(number, [])

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._kept.append(self._layer(*arguments, **options))
        return self._kept[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Fixed:
    """Stands in for the backbone for one call and returns given hidden states."""

    def __init__(self, backbone: nn.Module, hidden: mx.array):
        self._backbone, self._hidden = backbone, hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


def _locate(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the head, and the attribute of its backbone."""
    if isinstance(getattr(model, "language_model", None), nn.Module):
        return _locate(model.language_model)
    for name in BACKBONES:
        if isinstance(getattr(model, name, None), nn.Module):
            return model, name
    raise _refusal(model, f"none of {', '.join(BACKBONES)} is its backbone")


def _heads(owner: nn.Module, backbone: nn.Module) -> Iterator[Head]:
    """Head candidates, most likely first: every module times every declared way to scale or cap."""
    modules = [(owner.lm_head, False)] if isinstance(getattr(owner, "lm_head", None), nn.Module) else []
    modules += [
        (getattr(backbone, name), True) for name in EMBEDDINGS if hasattr(getattr(backbone, name, None), "as_linear")
    ]
    if not modules:
        raise _refusal(owner, "it has neither lm_head nor a tied embedding")
    for module, tied in modules:
        for scale in _scales(owner):
            for softcap in (_declared(owner, "final_logit_softcapping"), None):
                yield Head(module, tied, scale, softcap)


def _scales(owner: nn.Module) -> list[float]:
    scales = [1.0]
    if multiplier := _declared(owner, "logit_scale"):  # cohere
        scales.insert(0, multiplier)
    if divisor := _declared(owner, "logits_scaling"):  # granite
        scales.insert(0, 1 / divisor)
    base, size = _declared(owner, "dim_model_base"), _declared(owner, "hidden_size")
    if base and size:  # minicpm divides the hidden state
        scales.append(base / size)
    head, embedding = _declared(owner, "lm_head_multiplier"), _declared(owner, "embedding_multiplier")
    if head and embedding:  # falcon_h1 folds the embedding multiplier into a tied table
        scales += [head, head / embedding]
    return scales


def _declared(owner: nn.Module, key: str) -> float | None:
    for holder in (getattr(owner, "args", None), getattr(getattr(owner, "model", None), "args", None), owner):
        value = getattr(holder, key, None)
        if isinstance(value, int | float) and value > 0:
            return float(value)
    return None


def _close(ours: mx.array, theirs: mx.array) -> bool:
    if ours.shape != theirs.shape:
        return False
    tolerance = 1e-5 if theirs.dtype == mx.float32 else 2e-2
    theirs = theirs.astype(mx.float32)
    return bool((mx.abs(ours - theirs).max() <= tolerance * mx.abs(theirs).max() + 1e-6).item())


def _refusal(model: nn.Module, reason: str) -> UserError:
    family = getattr(model, "model_type", None) or type(model).__module__
    return UserError(
        f"the model family {family!r} cannot be split into backbone and head: {reason}",
        hint="choose a teacher and student of another family, e.g. llama, qwen3, gemma3_text, granite",
    )
