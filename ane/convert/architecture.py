"""What the converter must know about a decoder-only transformer, whatever its family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxkd.errors import UserError, unknown

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of one kind of layer: angle = position * inverse_frequency.

    Args:
        inverse_frequencies: radians per position, one per pair of dimensions.
        scale: factor on cos and sin (attention temperature of YaRN and LongRoPE).
        interleaved: pairs are (0, 1), (2, 3)... instead of (i, i + dim / 2).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False

    def table(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float16 [..., dim], of integer positions [...].

        The sine carries the sign of the rotation: out = x * cos + swap(x) * sin, where swap exchanges the two
        members of each pair.
        """
        angles = positions[..., None].astype(np.float64) * np.asarray(self.inverse_frequencies)
        cos, sin = np.cos(angles) * self.scale, np.sin(angles) * self.scale
        if self.interleaved:
            pair = [np.stack([cos, cos], -1), np.stack([-sin, sin], -1)]
            return tuple(a.reshape(*a.shape[:-2], -1).astype(np.float16) for a in pair)  # type: ignore[return-value]
        return (
            np.concatenate([cos, cos], -1).astype(np.float16),
            np.concatenate([-sin, sin], -1).astype(np.float16),
        )


@dataclass(frozen=True)
class Layer:
    """One decoder layer: which rotary table it uses (None: no positions) and its attention window (None: all)."""

    rotary: int | None = 0
    window: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder: sizes, the layers, and where families differ.

    Args:
        norm_offset: added to every norm weight (Gemma stores weight - 1).
        sandwich_norms: norms after attention and after the MLP as well (Gemma).
        clip_residual: keep the residual stream within float16 (what mlx-lm does for Gemma 3).
        embedding_scale: factor on embedded tokens.
        query_scale: factor on attention scores.
        attention_softcap, logit_softcap: cap * tanh(x / cap), None where absent.
        qk_norm: RMSNorm on each head's queries and keys.
        max_positions: tokens that the model was made for, see `longest_context`; None where its config does not say.
        tied: the head is the embedding; the weights decide, not the config.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    layers: tuple[Layer, ...]
    rotaries: tuple[Rotary, ...]
    query_scale: float
    activation: Activation = "silu"
    norm_offset: float = 0.0
    qk_norm: bool = False
    sandwich_norms: bool = False
    clip_residual: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    max_positions: int | None = None
    tied: bool = True


def longest_context(config: dict[str, Any]) -> int | None:
    """Positions that a config.json allows, or None where it does not say.

    transformers' convention: with ``original_max_position_embeddings`` a scaling reaches factor times that, and
    ``max_position_embeddings`` may already be the scaled length; without it (linear) the factor multiplies
    ``max_position_embeddings``.
    """
    longest = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if longest is None:
        return None
    original = scaling.get("original_max_position_embeddings", longest)
    return max(int(longest), int(original * (scaling.get("factor") or 1.0)))


def rotary(
    dim: int,
    base: float,
    scaling: dict[str, Any] | None = None,
    *,
    max_positions: int | None = None,
    interleaved: bool = False,
) -> Rotary:
    """The rotary embedding of a config entry, for each scaling that has fixed frequencies.

    Sources: RoPE arXiv 2104.09864; linear arXiv 2306.15595; llama3 Llama 3.1 model card; YaRN arXiv 2309.00071;
    LongRoPE arXiv 2402.13753.

    Raises:
        UserError: a scaling whose frequencies change with the length, or an unknown one.
    """
    inverse = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if kind in ("default", "mrope"):
        scale = 1.0
    elif kind == "linear":
        inverse, scale = inverse / scaling["factor"], 1.0
    elif kind == "llama3":
        inverse, scale = _llama3(inverse, scaling), 1.0
    elif kind == "yarn":
        inverse, scale = _yarn(inverse, dim, base, scaling)
    elif kind == "longrope":
        inverse, scale = _longrope(inverse, scaling, max_positions)
    elif kind == "dynamic":
        raise UserError(
            "rope_scaling 'dynamic' changes its frequencies with the length; a compiled program cannot",
            where="config.json: rope_scaling",
            hint="set a fixed scaling (linear, llama3, yarn, longrope) or remove rope_scaling",
        )
    else:
        known = ("default", "linear", "llama3", "yarn", "longrope")
        raise unknown("rope_scaling type", str(kind), known, where="config.json: rope_scaling")
    return Rotary(tuple(float(f) for f in inverse), float(scale), interleaved)


def _llama3(inverse: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    factor, low, high = (float(scaling.get(k, d)) for k, d in _LLAMA3_DEFAULTS)
    original = float(scaling.get("original_max_position_embeddings", 8192))
    wavelength = 2 * math.pi / inverse
    blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    blended = (1 - blend) * inverse / factor + blend * inverse
    return np.where(wavelength > original / low, inverse / factor, blended)


_LLAMA3_DEFAULTS = (("factor", 1.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))


def _yarn(inverse: np.ndarray, dim: int, base: float, scaling: dict[str, Any]) -> tuple[np.ndarray, float]:
    factor = float(scaling["factor"])
    original = float(scaling.get("original_max_position_embeddings", 4096))

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scaled = inverse / factor * ramp + inverse * (1 - ramp)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scaled, magnitude(scaling.get("mscale", 1)) / magnitude(scaling.get("mscale_all_dim", 0))


def _longrope(inverse: np.ndarray, scaling: dict[str, Any], max_positions: int | None) -> tuple[np.ndarray, float]:
    """mlx-lm uses the long factors at every length; so do we, for one cache of one kind."""
    original = float(scaling["original_max_position_embeddings"])
    factor = (max_positions or 131072) / original
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return inverse / np.asarray(scaling["long_factor"], dtype=np.float64), scale
