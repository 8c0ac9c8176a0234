"""Small random models of every family, written as mlx-lm folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ane.convert.source import CODES_FILE, METADATA_FILE
from mlxkd import compat
from mlxkd.quant.grids import FLOAT, grid

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# What each family adds; gemma3's pattern of 3 gives two windows, then a layer that sees everything.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"hidden_size": 64, "tie_word_embeddings": False},
    "qwen3": {"rope_theta": 1000000.0},
    "smollm3": {"num_hidden_layers": 4},
    "gemma2": {"query_pre_attn_scalar": 16.0, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 3, "query_pre_attn_scalar": 20, "head_dim": 32},
}


def make_toy(folder: Path, family: str, *, dtype: mx.Dtype = mx.float16, seed: int = 0, **changes: Any) -> Path:
    """A random model of a family; weights large enough that its next token is seldom a tie."""
    config = {"model_type": family, **COMMON, **FAMILIES[family], **changes}
    mx.random.seed(seed)
    model = compat.build_model(config)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        spread = 0.3 if value.ndim == 1 else 1.6 * value.shape[-1] ** -0.5
        middle = 1.0 if name.endswith("norm.weight") and not family.startswith("gemma") else 0.0
        weights[name] = (middle + spread * mx.random.normal(value.shape)).astype(dtype)
    if config["tie_word_embeddings"]:
        weights = {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed(folder: Path, out: Path, bits: int, group: int, mode: str = "affine") -> Path:
    """The folder as mlx-lm quantises it; affine scales in float16."""
    model, config = compat.load_model(folder)
    nn.quantize(model, group_size=group, bits=bits, mode=mode)
    config = {**config, "quantization": {"group_size": group, "bits": bits, "mode": mode}}
    compat.save_model_folder(out, model, config, folder)
    return out


def on_grid(folder: Path, out: Path, name: str) -> Path:
    """The folder with its matrices on a grid, as whoever makes such models saves them; "float" leaves it alone."""
    if name == FLOAT:
        return folder
    packing = grid(name).packing
    if packing is None:
        return student(folder, out, name)
    return packed(folder, out, packing["bits"], packing["group_size"], packing["mode"])


def student(folder: Path, out: Path, name: str) -> Path:
    """The folder as a student trained on a Neural Engine grid is saved: decoded weights, codes beside them."""
    model, config = compat.load_model(folder)
    codes: dict[str, mx.array] = {}
    grids = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not grid(name).fault(module.weight.shape):
            found = grid(name).encode(module.weight, mx.float16)
            module.weight = grid(name).decode(found, mx.float16)
            codes |= {f"{path}.{key}": value for key, value in found.items()}
            grids[path] = name
    metadata = json.dumps({"format": 1, "dtype": "float16", "grids": grids})
    compat.save_model_folder(out, model, config, folder, {METADATA_FILE: metadata}, extra_arrays={CODES_FILE: codes})
    return out
