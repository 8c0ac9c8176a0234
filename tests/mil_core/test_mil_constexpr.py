"""Compressed weights expand to what coremltools expands them to, nested ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ane.mil.package import Package

Make = Callable[[Any, Any, np.random.Generator], Any]


def _codes(types: Any, bits: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    dtype = np.uint8 if bits == 8 else getattr(types, f"np_uint{bits}_dtype")
    return rng.integers(0, 2**bits, shape).astype(dtype)


def _affine(mb: Any, types: Any, rng: np.random.Generator) -> Any:
    return mb.constexpr_affine_dequantize(
        quantized_data=rng.integers(-128, 128, (6, 8)).astype(np.int8),
        zero_point=rng.integers(-5, 5, 6).astype(np.int8),
        scale=rng.random(6).astype(np.float32),
        axis=np.int32(0),
    )


def _packed_lut(bits: int) -> Make:
    def make(mb: Any, types: Any, rng: np.random.Generator) -> Any:
        return mb.constexpr_lut_to_dense(
            indices=rng.integers(0, 256, -(-bits * 48 // 8)).astype(np.uint8),
            lut=rng.standard_normal(2**bits).astype(np.float32),
            shape=np.array([6, 8], np.uint32),
        )

    return make


def _packed_sparse(mb: Any, types: Any, rng: np.random.Generator) -> Any:
    mask = rng.integers(0, 2, 48).astype(np.uint8)
    values = rng.standard_normal(int(mask.sum())).astype(np.float32)
    packed = np.packbits(mask, bitorder="little")
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=packed, shape=np.array([6, 8], np.uint32))


def _blockwise(dtype: str, scales: tuple[int, int], float_offset: bool) -> Make:
    def make(mb: Any, types: Any, rng: np.random.Generator) -> Any:
        low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128)}[dtype]
        held = getattr(types, f"np_{dtype}_dtype", None) or np.dtype(dtype)
        data = rng.integers(low, high, (6, 8)).astype(held)
        scale = rng.random(scales).astype(np.float32)
        offset = rng.random(scales).astype(np.float32) if float_offset else rng.integers(0, 7, scales).astype(held)
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)

    return make


def _lut(bits: int, groups: tuple[int, int], vector: int = 1, axis: int | None = None) -> Make:
    def make(mb: Any, types: Any, rng: np.random.Generator) -> Any:
        lut = rng.standard_normal((*groups, 2**bits, vector)).astype(np.float32)
        options = {} if axis is None else {"vector_axis": np.int32(axis)}
        return mb.constexpr_lut_to_dense(indices=_codes(types, bits, (6, 8), rng), lut=lut, **options)

    return make


def _mask(types: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, (6, 8)).astype(types.np_uint1_dtype)


def _sparse(mb: Any, types: Any, rng: np.random.Generator) -> Any:
    mask = _mask(types, rng)
    return mb.constexpr_sparse_to_dense(nonzero_data=rng.random(int(mask.sum())).astype(np.float32), mask=mask)


def _lut_sparse(vector: int) -> Make:
    def make(mb: Any, types: Any, rng: np.random.Generator) -> Any:
        mask = _mask(types, rng)
        codes = _codes(types, 2, (int(mask.sum()),), rng)
        lut = rng.standard_normal((2 if vector == 1 else 1, 1, 4, vector)).astype(np.float32)
        options = {} if vector == 1 else {"vector_axis": np.int32(0)}
        new_mask, values = mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=codes, lut=lut, **options)
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=new_mask)

    return make


def _scaled_sparse(mb: Any, types: Any, rng: np.random.Generator) -> Any:
    mask = _mask(types, rng)
    data = rng.integers(-128, 128, int(mask.sum())).astype(np.int8)
    new_mask, values = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask, nonzero_data=data, scale=rng.random((1, 8)).astype(np.float32)
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=new_mask)


def _scaled_lut(mb: Any, types: Any, rng: np.random.Generator) -> Any:
    lut = rng.integers(-128, 128, (1, 1, 16, 1)).astype(np.int8)
    palette = mb.constexpr_lut_to_dense(indices=_codes(types, 4, (6, 8), rng), lut=lut)
    return mb.constexpr_blockwise_shift_scale(data=palette, scale=rng.random((6, 1)).astype(np.float32))


FORMS: dict[str, tuple[str, Make]] = {
    "affine": ("iOS16", _affine),
    **{f"packed palette of {bits} bits": ("iOS16", _packed_lut(bits)) for bits in (1, 2, 4, 6, 8)},
    "packed sparse": ("iOS16", _packed_sparse),
    **{
        f"{dtype} blocks {scales}{' float offset' if offset else ''}": ("iOS18", _blockwise(dtype, scales, offset))
        for dtype in ("int4", "uint4", "int8")
        for scales in ((6, 1), (3, 2), (1, 1))
        for offset in (False, True)
    },
    **{f"palette of {bits} bits": ("iOS18", _lut(bits, (1, 1))) for bits in (1, 2, 3, 4, 6, 8)},
    "palette by blocks": ("iOS18", _lut(4, (2, 4))),
    "palette of vectors": ("iOS18", _lut(2, (1, 1), 3, 0)),
    "palette of vectors along the last axis": ("iOS18", _lut(2, (3, 1), 2, 1)),
    "sparse": ("iOS18", _sparse),
    "sparse palette": ("iOS18", _lut_sparse(1)),
    "sparse palette of vectors": ("iOS18", _lut_sparse(2)),
    "sparse int8": ("iOS18", _scaled_sparse),
    "scaled int8 palette": ("iOS18", _scaled_lut),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_compressed_weight_expands_as_coremltools_expands_it(
    name: str, ct: Any, mb: Any, types: Any, run: Callable[..., Package]
) -> None:
    target, make = FORMS[name]
    seen: list[np.ndarray] = []

    @mb.program(input_specs=[mb.TensorSpec((1, 1))], opset_version=getattr(ct.target, target))
    def program(x):  # type: ignore[no-untyped-def]
        weight = make(mb, types, np.random.default_rng(3))
        seen.append(_materialised(weight.op))
        return mb.mul(x=x, y=weight, name="y")

    package = run(program, minimum_deployment_target=getattr(ct.target, target))
    got = package.predict({"x": np.ones((1, 1))})["y"]
    np.testing.assert_allclose(got, seen[0], rtol=1e-6, atol=1e-7)
    assert np.ptp(got) > 0


def _materialised(operation: Any) -> np.ndarray:
    value = operation.materialized_val_inference()
    return np.asarray(value, np.float32)


def test_fp16_weights_are_rounded_as_they_are_stored(ct: Any, mb: Any, run: Callable[..., Package]) -> None:
    scale = np.full((1, 1), 0.1, np.float16)

    @mb.program(input_specs=[mb.TensorSpec((1, 1))], opset_version=ct.target.iOS18)
    def program(x):  # type: ignore[no-untyped-def]
        data = np.arange(64, dtype=np.int8).reshape(1, 64)
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
        return mb.mul(x=x, y=mb.cast(x=weight, dtype="fp32"), name="y")

    got = run(program).predict({"x": np.ones((1, 1))})["y"]
    np.testing.assert_array_equal(got[0], (np.arange(64, dtype=np.float16) * scale[0]).astype(np.float32))
