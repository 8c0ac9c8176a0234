"""The parts every family shares, as MIL: norms, projections, rotary positions, attention, MLP.

Two arrangements of the same mathematics. On the Neural Engine activations are [batch, channels, 1, tokens] and
a linear layer is a 1x1 convolution (Apple, "Deploying Transformers on the Apple Neural Engine", 2022); for the
GPU they are [batch, tokens, channels] and a linear layer is a ``linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ane.convert.architecture import Architecture, Layer, Rotary
from ane.convert.constants import Constants, builder
from ane.convert.source import Source

F16_MAX = np.float16(65504)


class Blocks:
    """Emits MIL for one function under construction.

    Args:
        arch: the model. source: its weights. constants: those of the package.
        convolutions: the Neural Engine's arrangement instead of the GPU's.
        batch, query: rows and tokens per call.
    """

    def __init__(
        self, arch: Architecture, source: Source, constants: Constants, *, convolutions: bool, batch: int, query: int
    ):
        self.mb = builder()
        self.arch, self.source, self.constants = arch, source, constants
        self.convolutions, self.batch, self.query = convolutions, batch, query
        self.channel_axis = 1 if convolutions else -1
        self._matrices: dict[tuple[str, int, tuple[int, int] | None], Any] = {}

    # Vectors ---------------------------------------------------------------------------------------------

    def vector(self, path: str, shape: tuple[int, ...], offset: float = 0.0) -> Any:
        """A float16 vector of the source, reshaped; ``offset`` is added in float32."""

        def load() -> np.ndarray:
            return (self.source.vector(path).astype(np.float32) + offset).astype(np.float16).reshape(shape)

        return self.constants.var(path, shape, np.dtype(np.float16), load, inline=True)

    def rms_norm(self, x: Any, path: str, size: int, axis: int) -> Any:
        """x / sqrt(mean(x^2) + eps) * weight, as the layer norm of [x, -x], whose mean is zero.

        The Neural Engine has a layer norm and no RMSNorm; the doubled input makes them equal (ANEMLL).
        """
        mb = self.mb
        doubled = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=axis)
        normed = mb.layer_norm(x=doubled, axes=[axis], epsilon=np.float16(self.arch.eps))
        shape = list(x.shape)
        begin, end = [0] * len(shape), [*shape]
        half = mb.slice_by_index(x=normed, begin=begin, end=end)
        weight_shape = [1] * len(shape)
        weight_shape[axis] = size
        return mb.mul(x=half, y=self.vector(f"{path}.weight", tuple(weight_shape), self.arch.norm_offset))

    def norm(self, x: Any, path: str) -> Any:
        """RMSNorm over the channels of the residual stream."""
        return self.rms_norm(x, path, self.arch.hidden, self.channel_axis)

    # Matrices --------------------------------------------------------------------------------------------

    def matrix(self, path: str, rank: int = 2, rows: tuple[int, int] | None = None) -> Any:
        """A matrix [out, in] of the source, or [out, in, 1, 1] for rank 4; one value however often it is used."""
        key = (path, rank, rows)
        if key not in self._matrices:
            self._matrices[key] = self.source.weight(path).var(self.constants, rank=rank, rows=rows)
        return self._matrices[key]

    def project(self, x: Any, path: str, *, rows: tuple[int, int] | None = None, name: str | None = None) -> Any:
        """A linear layer of the source, or some rows of it; its bias, where it has one, is added."""
        named = {} if name is None else {"name": name}
        bias = {}
        if self.source.has(f"{path}.bias"):
            bias = {"bias": self.vector(f"{path}.bias", (self.source.weight(path).shape[0],))}
        if self.convolutions:
            return self.mb.conv(x=x, weight=self.matrix(path, 4, rows), pad_type="valid", **bias, **named)
        return self.mb.linear(x=x, weight=self.matrix(path, 2, rows), **bias, **named)

    def mlp(self, x: Any, path: str) -> Any:
        """down(activation(gate(x)) * up(x))."""
        gate = self.project(x, f"{path}.gate_proj")
        gate = (
            self.mb.silu(x=gate) if self.arch.activation == "silu" else self.mb.gelu(x=gate, mode="TANH_APPROXIMATION")
        )
        return self.project(self.mb.mul(x=gate, y=self.project(x, f"{path}.up_proj")), f"{path}.down_proj")

    # Heads -----------------------------------------------------------------------------------------------

    def split_heads(self, x: Any, heads: int) -> Any:
        """Projected activations to [batch, heads, tokens, head_dim]."""
        mb, dim = self.mb, self.arch.head_dim
        if self.convolutions:
            x = mb.reshape(x=x, shape=[self.batch, heads, dim, self.query])
            return mb.transpose(x=x, perm=[0, 1, 3, 2])
        x = mb.reshape(x=x, shape=[self.batch, self.query, heads, dim])
        return mb.transpose(x=x, perm=[0, 2, 1, 3])

    def merge_heads(self, x: Any) -> Any:
        """[batch, heads, tokens, head_dim] back to activations."""
        mb, width = self.mb, self.arch.heads * self.arch.head_dim
        if self.convolutions:
            x = mb.transpose(x=x, perm=[0, 1, 3, 2])
            return mb.reshape(x=x, shape=[self.batch, width, 1, self.query])
        x = mb.transpose(x=x, perm=[0, 2, 1, 3])
        return mb.reshape(x=x, shape=[self.batch, self.query, width])

    def rotate(self, x: Any, rotary: Rotary, cos: Any, sin: Any) -> Any:
        """x * cos + swap(x) * sin over [batch, heads, tokens, head_dim]; the sine carries the signs."""
        mb, dim = self.mb, self.arch.head_dim
        if rotary.interleaved:
            # Swapping neighbours is a product with a permutation; exact, every sum has one term.
            swapped = mb.matmul(x=x, y=_neighbours(dim))
        else:
            low, high = mb.split(x=x, num_splits=2, axis=-1)
            swapped = mb.concat(values=[high, low], axis=-1)
        return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=swapped, y=sin))

    def queries_keys_values(self, x: Any, path: str, layer: Layer, tables: dict[int, tuple[Any, Any]]) -> list[Any]:
        """Per-head queries (scaled), keys and values of the new tokens."""
        arch = self.arch
        parts = []
        for name, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads)):
            part = self.split_heads(self.project(x, f"{path}.{name}_proj"), heads)
            if name != "v":
                if arch.qk_norm:
                    part = self.rms_norm(part, f"{path}.{name}_norm", arch.head_dim, -1)
                if layer.rotary is not None:
                    part = self.rotate(part, arch.rotaries[layer.rotary], *tables[layer.rotary])
            parts.append(part)
        parts[0] = self.mb.mul(x=parts[0], y=np.float16(arch.query_scale))
        return parts

    def attend(self, queries: Any, pairs: list[tuple[Any, Any]], mask: Any) -> Any:
        """softmax(cap(q k) + mask) v over one or more (keys, values) whose keys the mask lists in order.

        Decomposed, without the fused op, whose Neural Engine path is missing or wrong. The queries that share a
        key-value head lie side by side in one product, so keys and values are never repeated.
        """
        mb, arch = self.mb, self.arch
        rows = arch.heads // arch.kv_heads * self.query
        grouped = mb.reshape(x=queries, shape=[self.batch, arch.kv_heads, rows, arch.head_dim])
        scores = [mb.matmul(x=grouped, y=keys, transpose_y=True) for keys, _ in pairs]
        score = mb.concat(values=scores, axis=-1) if len(scores) > 1 else scores[0]
        length = score.shape[-1]
        if arch.attention_softcap:
            score = self.softcap(score, arch.attention_softcap)
        if self.query > 1:  # one token's mask broadcasts over the grouped rows as it is
            score = mb.reshape(x=score, shape=[self.batch, arch.heads, self.query, length])
        share = mb.softmax(x=mb.add(x=score, y=mask), axis=-1)
        if self.query > 1:
            share = mb.reshape(x=share, shape=[self.batch, arch.kv_heads, rows, length])
        out = self._weighted(share, [values for _, values in pairs])
        return mb.reshape(x=out, shape=[self.batch, arch.heads, self.query, arch.head_dim])

    def _weighted(self, share: Any, values: list[Any]) -> Any:
        if len(values) == 1:
            return self.mb.matmul(x=share, y=values[0])
        parts = self.mb.split(x=share, split_sizes=[v.shape[2] for v in values], axis=-1)
        first, second = (self.mb.matmul(x=p, y=v) for p, v in zip(parts, values, strict=True))
        return self.mb.add(x=first, y=second)

    # Layers ----------------------------------------------------------------------------------------------

    def softcap(self, x: Any, cap: float) -> Any:
        """cap * tanh(x / cap)."""
        mb = self.mb
        return mb.mul(x=mb.tanh(x=mb.mul(x=x, y=np.float16(1 / cap))), y=np.float16(cap))

    def residual(self, x: Any, y: Any, name: str) -> Any:
        """x + y, kept within float16 where the family does so."""
        if not self.arch.clip_residual:
            return self.mb.add(x=x, y=y, name=name)
        return self.mb.clip(x=self.mb.add(x=x, y=y), alpha=-F16_MAX, beta=F16_MAX, name=name)

    def layer(self, x: Any, index: int, attention: Callable[[Any, str, Layer], Any]) -> Any:
        """One decoder layer; ``attention`` takes (normed activations, path, layer) to attended activations."""
        path, sandwich = f"model.layers.{index}", self.arch.sandwich_norms
        attended = attention(self.norm(x, f"{path}.input_layernorm"), f"{path}.self_attn", self.arch.layers[index])
        attended = self.project(attended, f"{path}.self_attn.o_proj")
        if sandwich:
            attended = self.norm(attended, f"{path}.post_attention_layernorm")
        x = self.residual(x, attended, f"layer_{index}_attention")
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        out = self.mlp(self.norm(x, f"{path}.{before}"), f"{path}.mlp")
        if sandwich:
            out = self.norm(out, f"{path}.post_feedforward_layernorm")
        return self.residual(x, out, f"layer_{index}")


def _neighbours(dim: int) -> np.ndarray:
    """Permutation [dim, dim] that exchanges 2i and 2i + 1."""
    return np.eye(dim, dtype=np.float16)[np.arange(dim) ^ 1]
