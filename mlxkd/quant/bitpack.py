"""Codes to MLX's packed words and back: one little-endian bit stream, lowest bits first, for every width."""

from __future__ import annotations

import mlx.core as mx


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Unsigned codes [..., n] below 2**bits (n divisible by 32) to words uint32 [..., n * bits / 32]."""
    eight = codes.astype(mx.uint64).reshape(*codes.shape[:-1], -1, 8)
    shifts = mx.arange(8, dtype=mx.uint64) * bits
    # Eight codes fill exactly `bits` bytes, whatever the width; their bits do not overlap, so the sum is an or.
    stream = mx.sum(mx.left_shift(eight, shifts), axis=-1, keepdims=True)
    octets = mx.right_shift(stream, mx.arange(bits, dtype=mx.uint64) * 8) & 255
    return octets.astype(mx.uint8).flatten(-2).view(mx.uint32)


def unpack_codes(words: mx.array, bits: int) -> mx.array:
    """Words uint32 [..., n * bits / 32] to codes uint8 [..., n]."""
    octets = words.view(mx.uint8).reshape(*words.shape[:-1], -1, bits).astype(mx.uint64)
    stream = mx.sum(mx.left_shift(octets, mx.arange(bits, dtype=mx.uint64) * 8), axis=-1, keepdims=True)
    eight = mx.right_shift(stream, mx.arange(8, dtype=mx.uint64) * bits) & ((1 << bits) - 1)
    return eight.astype(mx.uint8).flatten(-2)
