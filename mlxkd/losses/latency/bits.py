"""Sets of token ids, 32 to a word: a mask per position at 1/8 of the memory of booleans."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def pack(mask: np.ndarray) -> np.ndarray:
    """bool [n, V] to uint32 [n, ceil(V / 32)], bit v % 32 of word v // 32."""
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
    words = np.packbits(padded, axis=1, bitorder="little")
    return np.ascontiguousarray(words).view("<u4").astype(np.uint32)


def unpack(words: mx.array, vocabulary: int) -> mx.array:
    """uint32 [n, W] to float32 [n, V] of zeros and ones."""
    bits = mx.repeat(words, 32, axis=1)[:, :vocabulary]
    return (mx.right_shift(bits, mx.arange(vocabulary, dtype=mx.uint32) % 32) & 1).astype(mx.float32)
