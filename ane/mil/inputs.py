"""Bring what the caller gives into the form the program declares, or say why it does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ane.mil.limits import Limits
from ane.mil.program import Feature, FunctionSpec
from ane.mil.types import FLOATS, HELD_AS, StateType, TensorType
from mlxkd.errors import UserError, unknown

PIL_MODES = {"GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F", "RGB": "RGB", "BGR": "RGB"}


def prepare(spec: FunctionSpec, given: Mapping[str, Any], limits: Limits) -> dict[str, np.ndarray]:
    """Arrays for every input that is not a state; raises UserError for missing, unknown, misshapen or huge ones."""
    wanted = {name: t for name, t in spec.inputs if isinstance(t, TensorType)}
    other = [name for name, t in spec.inputs if not isinstance(t, TensorType | StateType)]
    if other:
        raise UserError(f"inputs {', '.join(other)} are neither tensors nor states", where=f"function {spec.name!r}")
    for name in given:
        if name not in wanted:
            raise unknown("input", name, wanted, where=f"function {spec.name!r}")
    return {name: _array(name, declared, spec.features.get(name), given, limits) for name, declared in wanted.items()}


def _array(
    name: str, declared: TensorType, feature: Feature | None, given: Mapping[str, Any], limits: Limits
) -> np.ndarray:
    if name not in given:
        if feature is None or not feature.optional:
            raise UserError(f"input {name!r} is missing", hint=f"give {declared}")
        _bounded(name, feature.shape, limits)
        value: Any = np.full(feature.shape, feature.default or 0)
    else:
        value = given[name]
    array = _image(value, feature) if feature and feature.kind == "image" else np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"input {name!r} holds {array.dtype}, not numbers")
    if declared.shape == () and array.shape == (1,):
        array = array.reshape(())
    if not declared.accepts(array.shape):
        raise UserError(f"input {name!r} has shape {list(array.shape)}, the function takes {declared}")
    if feature and not feature.allows(array.shape):
        raise UserError(f"input {name!r} has shape {list(array.shape)}, allowed: {_allowed(feature)}")
    return _cast(array, declared)


def _cast(array: np.ndarray, declared: TensorType) -> np.ndarray:
    """Round to the declared dtype, then hold floats in fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(HELD_AS[declared.dtype])
        return array.astype(np.float32) if declared.dtype in FLOATS else array


def _allowed(feature: Feature) -> str:
    if feature.shapes:
        return " or ".join(str(list(s)) for s in feature.shapes)
    return "[" + ", ".join(f"{low}..{'' if high is None else high}" for low, high in feature.ranges) + "]"


def _image(value: Any, feature: Feature) -> np.ndarray:
    """A PIL image as [1, C, H, W] in the feature's channel order; an array passes as it is."""
    if not hasattr(value, "convert"):
        return np.asarray(value)
    color = feature.color or "RGB"
    pixels = np.asarray(value.convert(PIL_MODES[color]))
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return (planes[::-1] if color == "BGR" else planes)[None]


def _bounded(name: str, shape: tuple[int, ...], limits: Limits) -> None:
    """Shapes of a description are bounded by nothing else: the program may leave a dimension open."""
    if min(shape, default=0) < 0:
        raise UserError(f"input {name!r} has the default shape {list(shape)}")
    limits.check(math.prod(shape), f"input {name!r} of shape {list(shape)}")


def random_inputs(spec: FunctionSpec, seed: int = 0, limits: Limits | None = None) -> dict[str, np.ndarray]:
    """Inputs of the default shapes for trying a function: normal floats, zero integers (valid as indices).

    Raises:
        UserError: a default shape beyond the memory bound.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, declared in spec.inputs:
        if not isinstance(declared, TensorType):
            continue
        default = spec.features[name].shape if name in spec.features else ()
        shape = tuple(
            d if d is not None else (default[i] if i < len(default) else 1) for i, d in enumerate(declared.shape or ())
        )
        _bounded(name, shape, limits or Limits())
        values = rng.standard_normal(shape) if declared.dtype in FLOATS else np.zeros(shape)
        found[name] = values.astype(HELD_AS[declared.dtype])
    return found
