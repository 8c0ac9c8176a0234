"""From float masters to what ships: codes made once, evaluated as they are, saved, loaded."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.quant.behaviour import backend_behaviour
from mlxkd.quant.grids import Codes, grid
from mlxkd.quant.modules import Spec, deployed_codes, dtype_name, master, spec_of
from mlxkd.quant.plan import attached, forget
from mlxkd.runtime import artefact_metadata

METADATA_FILE = "mlxkd.json"
CODES_FILE = "codes.safetensors"
FORMAT = 1


@dataclass
class Packed:
    """A student as it ships.

    Args:
        model: a normal mlx-lm model: packed layers for MLX grids, decoded weights for the others.
        config: its config.json, with mlx-lm's "quantization" entry where a layer is packed.
        grids: layer path -> grid name of every layer on a grid.
        codes: layer path -> codes, for every such layer; arrays shared with the model where it is packed.
        dtype: dtype of scales and float weights.
        metadata: what mlxkd.json said when loaded; empty for a fresh one.
    """

    model: nn.Module
    config: dict[str, Any]
    grids: dict[str, str]
    codes: dict[str, Codes]
    dtype: mx.Dtype
    metadata: dict[str, Any] = field(default_factory=dict)


def clone(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every array; changing one tree leaves the other alone."""
    return _clone(module, {})


def _clone(value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, nn.Module):
        twin = seen[id(value)] = copy.copy(value)
        # A shallow copy shares what freeze() and activate() change in place.
        twin._no_grad = set(value._no_grad)
        if hasattr(value, "qat"):
            twin.qat = replace(value.qat, specs=dict(value.qat.specs))
        for name, child in value.items():
            twin[name] = _clone(child, seen)
        return twin
    if isinstance(value, dict):
        return {name: _clone(child, seen) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_clone(child, seen) for child in value)
    return value


def pack(model: nn.Module, config: dict[str, Any], *, target: str | None = None) -> Packed:
    """The deployed student of a model in training, whose masters stay untouched.

    Evaluate this: its kernels and codes are those of the saved folder, bit for bit on one backend.

    Args:
        config: the float model's config.json.
        target: whose grids to pack; the active ones when None.

    Raises:
        UserError: no layer lies on a grid.
    """
    specs = {path: found for path, module in attached(model).items() if (found := spec_of(module, target))}
    if not specs:
        raise UserError("nothing to pack: no layer lies on a grid", hint="attach a plan and activate its target first")
    dtype = next(iter(specs.values()))[1].dtype
    twin = clone(model)
    layers = attached(twin)
    codes: dict[str, Codes] = {}
    for path, (name, spec) in specs.items():
        codes[path] = deployed_codes(layers[path], name, spec)
    for path, module in layers.items():
        if "lora_a" in module:
            module = _merge(twin, path, module)
        _ship(module, specs[path][1] if path in specs else None, codes.get(path))
    grids = {path: spec.grid.name for path, (_, spec) in specs.items()}
    _cast(twin, dtype)
    twin.eval()
    mx.eval(twin.parameters(), codes)
    return Packed(twin, _config(config, grids, dtype), grids, codes, dtype)


def _merge(model: nn.Module, path: str, adapter: nn.Module) -> nn.Module:
    """Put the adapter's own linear layer, with the merged weight, in its place; returns that layer."""
    linear = adapter.linear
    linear.weight = master(adapter)
    for target, spec in adapter.qat.specs.items():
        forget(adapter, target, spec)
    linear.qat = replace(adapter.qat, float_class=type(linear), specs={})
    model.update_modules(tree_unflatten([(path, linear)]))
    return linear


def _ship(module: nn.Module, spec: Spec | None, codes: Codes | None) -> None:
    """Turn a swapped layer of a clone into the plain or packed layer that mlx-lm loads."""
    state = module.qat
    for target, each in state.specs.items():
        forget(module, target, each)
    del module.qat
    module.__class__ = state.float_class
    if spec is None or codes is None:
        return
    if spec.grid.packing is None:
        module.weight = spec.grid.decode(codes, spec.dtype)
        return
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.dims = module.weight.shape
    for name, value in codes.items():
        module[name] = value
    for name, value in spec.grid.packing.items():
        setattr(module, name, value)
    if "biases" not in codes:
        module.biases = None
    module.__class__ = _packed_class(state.float_class)
    if state.float_class is compat.switch_linear_class():
        module.global_scale = None
    module.freeze()


def _packed_class(float_class: type[nn.Module]) -> type[nn.Module]:
    packed: dict[type[nn.Module], type[nn.Module]] = {
        nn.Linear: nn.QuantizedLinear,
        nn.Embedding: nn.QuantizedEmbedding,
        compat.switch_linear_class(): compat.quantized_switch_linear_class(),
    }
    return packed[float_class]


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast float parameters to the deployment dtype, but for those the model's family keeps (cast_predicate)."""
    wanted = getattr(model, "cast_predicate", None) or (lambda _: True)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and wanted(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _config(config: dict[str, Any], grids: dict[str, str], dtype: mx.Dtype) -> dict[str, Any]:
    """config.json of the packed model: the commonest grid at the top, the other layers by path."""
    result = copy.deepcopy(config)
    result["torch_dtype"] = dtype_name(dtype)
    entries = {path: entry for path, name in grids.items() if (entry := grid(name).packing)}
    if not entries:
        return result
    common = Counter(grids[path] for path in entries).most_common(1)[0][0]
    others = {path: entry for path, entry in entries.items() if grids[path] != common}
    result["quantization"] = {**(grid(common).packing or {}), **others}
    return result


def save_student(
    folder: str | Path, packed: Packed, tokenizer_from: str | Path, metadata: dict[str, Any] | None = None
) -> None:
    """Write a packed student as an mlx-lm folder, whole or not at all.

    Beside the model stand mlxkd.json (grid of every layer, dtype, versions, device, backend behaviour, whatever
    ``metadata`` adds) and, when a grid has no packed form in MLX, codes.safetensors.

    Raises:
        UserError: the folder cannot be written.
    """
    loose = {path: codes for path, codes in packed.codes.items() if grid(packed.grids[path]).packing is None}
    document = {
        "format": FORMAT,
        "dtype": dtype_name(packed.dtype),
        "grids": packed.grids,
        "backend": backend_behaviour(),
        **artefact_metadata(),
        **(metadata or {}),
    }
    arrays = {CODES_FILE: dict(tree_flatten(loose))} if loose else {}
    text = json.dumps(document, indent=2) + "\n"
    compat.save_model_folder(
        Path(folder), packed.model, packed.config, Path(tokenizer_from), {METADATA_FILE: text}, extra_arrays=arrays
    )


def load_student(folder: str | Path) -> Packed:
    """Load what `save_student` wrote; nothing is quantised again.

    Raises:
        UserError: not a student of mlxkd's, of a newer format, or with parts missing.
    """
    folder = Path(folder)
    if not (folder / METADATA_FILE).is_file():
        raise UserError(f"not a packed student: {METADATA_FILE} is missing", where=str(folder))
    metadata = _read_metadata(folder / METADATA_FILE)
    model, config = compat.load_model(folder)
    loose: Any = mx.load(str(folder / CODES_FILE)) if (folder / CODES_FILE).is_file() else {}
    modules = dict(model.named_modules())
    codes: dict[str, Codes] = {}
    for path, name in metadata["grids"].items():
        packed = grid(name).packing is not None
        codes[path] = _packed_codes(modules.get(path)) if packed else _below(loose, path)
        if not codes[path]:
            missing = f"the weights hold no codes of {path} ({name})" if packed else f"no codes of {path} ({name})"
            where = folder if packed else folder / CODES_FILE
            raise UserError(missing, where=str(where), hint="copy the student's whole folder again")
    return Packed(model, config, metadata["grids"], codes, getattr(mx, metadata["dtype"]), metadata)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["format"] != FORMAT:
            raise UserError(f"format {metadata['format']!r} is not {FORMAT}", where=str(path))
        if not isinstance(metadata["grids"], dict) or not hasattr(mx, metadata["dtype"]):
            raise ValueError("its grids or dtype mean nothing")
    except (ValueError, KeyError, TypeError) as error:
        hint = "it is damaged: copy the student's whole folder again"
        raise UserError(f"cannot be read as a student's description ({error!r})", where=str(path), hint=hint) from error
    return dict(metadata)


def _packed_codes(layer: nn.Module | None) -> Codes:
    if layer is None or "scales" not in layer:
        return {}
    return {key: layer[key] for key in ("weight", "scales", "biases") if key in layer}


def _below(arrays: dict[str, mx.array], path: str) -> Codes:
    """Arrays named "path.name", by name."""
    return {key.rpartition(".")[2]: value for key, value in arrays.items() if key.rpartition(".")[0] == path}


def changed_codes(before: Packed, after: Packed) -> int:
    """How many weights have another code; both must hold the same layers on the same grids."""
    if before.grids != after.grids:
        raise UserError("the students lie on different grids")
    flips = [
        mx.sum(grid(name).indices(before.codes[path]) != grid(name).indices(after.codes[path]))
        for path, name in before.grids.items()
    ]
    return int(sum(int(count) for count in flips))
