"""What a model says about its own inputs, outputs and states (mlmodel/format/FeatureTypes.proto)."""

from __future__ import annotations

from typing import Any

from ane.mil.program import Feature
from mlxkd.errors import UserError

# ArrayFeatureType.ArrayDataType.
ARRAY_DTYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}
COLORS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}
CHANNELS = {"GRAYSCALE": 1, "RGB": 3, "BGR": 3, "GRAYSCALE_FLOAT16": 1}


def metadata(message: Any) -> dict[str, str]:
    """Author, licence, version, description and the user's own entries, without the empty ones."""
    fields = {
        "description": message.shortDescription,
        "version": message.versionString,
        "author": message.author,
        "license": message.license,
        **{key: message.userDefined[key] for key in sorted(message.userDefined)},
    }
    return {key: value for key, value in fields.items() if value}


def feature(message: Any) -> Feature:
    """One FeatureDescription; raises UserError for a kind that no ML program has."""
    kind = message.type.WhichOneof("Type")
    common = {"description": message.shortDescription, "optional": message.type.isOptional}
    if kind == "multiArrayType":
        return _array(message.name, "array", message.type.multiArrayType, common)
    if kind == "stateType":
        return _array(message.name, "state", message.type.stateType.arrayType, common)
    if kind == "imageType":
        return _image(message.name, message.type.imageType, common)
    if kind == "dictionaryType":
        key = "string" if message.type.dictionaryType.WhichOneof("KeyType") == "stringKeyType" else "int64"
        return Feature(message.name, "dictionary", key, **common)
    if kind in ("stringType", "int64Type", "doubleType"):
        name = kind.removesuffix("Type")
        return Feature(message.name, name, {"double": "fp64"}.get(name, name), **common)
    raise UserError(f"feature {message.name!r} is of kind {kind!r}")


def _array(name: str, kind: str, message: Any, common: dict[str, Any]) -> Feature:
    if message.dataType not in ARRAY_DTYPES:
        raise UserError(f"feature {name!r} has unknown array type {message.dataType}")
    default = message.WhichOneof("defaultOptionalValue")
    return Feature(
        name,
        kind,
        ARRAY_DTYPES[message.dataType],
        tuple(message.shape),
        tuple(tuple(s.shape) for s in message.enumeratedShapes.shapes),
        tuple(_range(r) for r in message.shapeRange.sizeRanges),
        default=getattr(message, default) if default else None,
        **common,
    )


def _range(message: Any) -> tuple[int, int | None]:
    return int(message.lowerBound), None if message.upperBound < 0 else int(message.upperBound)


def _image(name: str, message: Any, common: dict[str, Any]) -> Feature:
    if message.colorSpace not in COLORS:
        raise UserError(f"image {name!r} has unknown colour space {message.colorSpace}")
    color = COLORS[message.colorSpace]
    channels = CHANNELS[color]
    sizes = tuple((1, channels, s.height, s.width) for s in message.enumeratedSizes.sizes)
    area = message.imageSizeRange
    fixed: tuple[tuple[int, int | None], ...] = ((1, 1), (channels, channels))
    ranges = (*fixed, _range(area.heightRange), _range(area.widthRange)) if message.HasField("imageSizeRange") else ()
    shape = (1, channels, int(message.height), int(message.width))
    return Feature(name, "image", "fp32", shape, sizes, ranges, color, **common)
