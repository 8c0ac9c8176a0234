"""Students cut out of a teacher: fewer layers, narrower layers. The result is a normal mlx-lm model and config."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.compat import build_model
from mlxkd.errors import UserError
from mlxkd.trees import leaves

Config = dict[str, Any]
_LAYER = re.compile(r"(^|.*\.)layers\.(\d+)\.")


def depth(model: nn.Module, config: Config, keep_layers: Sequence[int]) -> tuple[nn.Module, Config]:
    """A model of some of the layers, in order.

    Args:
        model: the teacher, in float weights.
        config: its config.json.
        keep_layers: ascending layer numbers.

    Returns:
        A new model (arrays shared with the teacher until one of them is updated) and its config.

    Raises:
        UserError: layers that do not exist or are out of order, quantised weights, or a family whose layer kinds
            depend on the position in a way the config cannot express.
    """
    total = _layers(config)
    keep = list(keep_layers)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= total:
        raise UserError(f"layers to keep must be ascending numbers from 0 to {total - 1}, not {keep}", where="student")
    pattern = config.get("sliding_window_pattern")
    if pattern and any(((new + 1) % pattern == 0) != ((old + 1) % pattern == 0) for new, old in enumerate(keep)):
        raise UserError(
            f"every {pattern}th layer of this family attends globally; keeping {keep} would change their kind",
            where="student",
            hint=f"keep whole blocks of {pattern} layers",
        )
    pruned = copy.deepcopy(config)
    pruned["num_hidden_layers"] = len(keep)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == total and key.startswith(("layer", "mlp_only", "no_rope")):
            pruned[key] = [value[i] for i in keep]
    new_number = {old: new for new, old in enumerate(keep)}
    weights = []
    for name, value in _float_weights(model, config):
        found = _LAYER.match(name)
        if found and int(found[2]) not in new_number:
            continue
        if found:
            name = f"{found[1]}layers.{new_number[int(found[2])]}.{name[found.end() :]}"
        weights.append((name, value))
    return _filled(pruned, weights), pruned


def width(
    model: nn.Module,
    config: Config,
    *,
    channels: Sequence[Sequence[int]] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
) -> tuple[nn.Module, Config]:
    """A model with some of the MLP channels and attention groups of every layer.

    Args:
        model: the teacher, in float weights, with separate q, k, v and gate, up projections.
        config: its config.json.
        channels: for each layer the MLP channels to keep, equally many.
        groups: for each layer the KV heads to keep, each with its query heads, equally many.

    Raises:
        UserError: indices that do not exist, unequal numbers, quantised weights or an unsupported family.
    """
    total, heads = _layers(config), config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    pruned = copy.deepcopy(config)
    cuts: dict[str, tuple[int, list[mx.array]]] = {}
    if channels is not None:
        kept = _checked("channels", channels, total, config["intermediate_size"])
        pruned["intermediate_size"] = len(kept[0])
        rows = [mx.array(layer) for layer in kept]
        cuts |= {"mlp.gate_proj": (0, rows), "mlp.up_proj": (0, rows), "mlp.down_proj": (1, rows)}
    if groups is not None:
        kept = _checked("groups", groups, total, kv)
        shared = heads // kv
        pruned |= {"num_key_value_heads": len(kept[0]), "num_attention_heads": len(kept[0]) * shared, "head_dim": size}
        keys, queries = [_spread(layer, size) for layer in kept], [_spread(layer, size * shared) for layer in kept]
        cuts |= {"self_attn.k_proj": (0, keys), "self_attn.v_proj": (0, keys)}
        cuts |= {"self_attn.q_proj": (0, queries), "self_attn.o_proj": (1, queries)}
    weights = _float_weights(model, config)
    for part in cuts:
        if not any(f".{part}.weight" in name for name, _ in weights):
            raise UserError(f"this family has no {part}; its width cannot be pruned", where="student")
    return _filled(pruned, [(name, _cut(name, value, cuts)) for name, value in weights]), pruned


def _cut(name: str, value: mx.array, cuts: dict[str, tuple[int, list[mx.array]]]) -> mx.array:
    found = _LAYER.match(name)
    part, _, kind = name[found.end() :].rpartition(".") if found else ("", "", "")
    if found is None or part not in cuts:
        return value
    axis, kept = cuts[part]
    if kind == "bias" and axis == 1:  # outputs stay whole where only inputs are cut
        return value
    return mx.take(value, kept[int(found[2])], axis=axis)


def _spread(groups: Sequence[int], size: int) -> mx.array:
    """Row numbers of whole groups of ``size`` rows."""
    return (mx.array(list(groups))[:, None] * size + mx.arange(size)[None]).reshape(-1)


def _checked(what: str, given: Sequence[Sequence[int]], layers: int, limit: int) -> list[list[int]]:
    kept = [sorted({int(i) for i in layer}) for layer in given]
    if len(kept) != layers:
        raise UserError(
            f"{what} to keep must be given for each of the {layers} layers, not {len(kept)}", where="student"
        )
    sizes = {len(layer) for layer in kept}
    if len(sizes) != 1 or 0 in sizes or any(len(k) != len(g) for k, g in zip(kept, given, strict=True)):
        raise UserError(f"every layer must keep equally many {what}, each once", where="student")
    if any(layer[0] < 0 or layer[-1] >= limit for layer in kept):
        raise UserError(f"{what} are numbered 0 to {limit - 1}", where="student")
    return kept


def _layers(config: Config) -> int:
    if "num_hidden_layers" not in config:
        raise UserError("this config names no num_hidden_layers; its model cannot be pruned", where="student")
    return int(config["num_hidden_layers"])


def _float_weights(model: nn.Module, config: Config) -> list[tuple[str, mx.array]]:
    weights = leaves(model.parameters())
    if config.get("quantization") or any(value.dtype == mx.uint32 for _, value in weights):
        raise UserError(
            "a quantised model cannot be pruned", where="student", hint="prune the float model it was made from"
        )
    return weights


def _filled(config: Config, weights: list[tuple[str, mx.array]]) -> nn.Module:
    model = build_model(config)
    try:
        model.load_weights(weights, strict=True)
    except ValueError as error:
        raise UserError(f"the pruned config does not describe the pruned weights: {error}", where="student") from error
    return model
