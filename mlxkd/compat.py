"""Every call into mlx-lm, in one place (written against mlx-lm 0.32.2).

mlx-lm's interfaces move between minor releases; a change there is a change here and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import json
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.errors import UserError, unknown
from mlxkd.files import atomic_folder
from mlxkd.runtime import open_file_limit_kept


def _mlx_lm_utils() -> Any:
    with open_file_limit_kept():
        import mlx_lm.utils
    return mlx_lm.utils


def resolve_model(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: a local path, or a Hugging Face repository fetched once.

    Raises:
        UserError: no such folder, and no repository of that name can be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError("this folder is no model: config.json is missing", where=str(path))
        return path
    looks_local = len(path.parts) != 2 or str(name).startswith((".", "/", "~"))
    if looks_local:
        raise UserError("no such model folder", where=str(name), hint="give a folder or a Hugging Face repository")
    try:
        return Path(_mlx_lm_utils()._download(str(name), revision=revision))
    except (OSError, ValueError) as error:
        reason = f"neither a folder nor a reachable Hugging Face repository ({type(error).__name__})"
        raise UserError(reason, where=str(name), hint="check the name and the network") from error


def load_config(folder: Path) -> dict[str, Any]:
    """The model's config.json as a dictionary."""
    try:
        return dict(_mlx_lm_utils().load_config(folder))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"config.json cannot be read: {error}", where=str(folder)) from error


def load_model(
    folder: Path, *, lazy: bool = False, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Load weights and architecture from a model folder; returns (model, config).

    Raises:
        UserError: no weights, an unsupported architecture, or weights that do not fit the config.
    """
    try:
        model, config = _mlx_lm_utils().load_model(folder, lazy=lazy, trust_remote_code=trust_remote_code)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise UserError(f"the model cannot be loaded: {error}", where=str(folder)) from error
    return model, dict(config)


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """mlx-lm's TokenizerWrapper (chat template, tool parser, streaming detokenizer) of a model folder."""
    config = load_config(folder) if config is None else config
    try:
        return _mlx_lm_utils().load_tokenizer(folder, None, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer cannot be loaded: {error}", where=str(folder)) from error


def plain_tokenizer(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper; any other tokenizer as it is."""
    with open_file_limit_kept():
        from mlx_lm.tokenizer_utils import TokenizerWrapper
    return tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer


def load(name: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load (model, tokenizer, config) from a folder or a Hugging Face repository."""
    folder = resolve_model(name)
    model, config = load_model(folder, lazy=lazy)
    return model, load_tokenizer(folder, config), config


def build_model(config: dict[str, Any]) -> nn.Module:
    """A model of this config with fresh random weights.

    Raises:
        UserError: mlx-lm has no such architecture, or a required key is absent.
    """
    try:
        model_class, args_class = _mlx_lm_utils()._get_classes(config)
        return model_class(args_class.from_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"no model can be built from this config: {error}", where="config") from error


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def save_model_folder(
    target: Path,
    model: nn.Module,
    config: dict[str, Any],
    tokenizer_from: Path,
    extra_files: dict[str, str] | None = None,
    extra_arrays: dict[str, dict[str, mx.array]] | None = None,
) -> None:
    """Write an mlx-lm model folder, whole or not at all.

    Args:
        target: the folder to write (replaced if it exists).
        model: its parameters are written as they are, packed codes included.
        config: written as config.json; a "quantization" entry is repeated as "quantization_config".
        tokenizer_from: folder whose tokenizer files are copied byte for byte.
        extra_files: further text files, by name.
        extra_arrays: further safetensors files, by name.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    utils = _mlx_lm_utils()
    with atomic_folder(target) as temporary:
        try:
            utils.save_model(temporary, model)
            for name, arrays in (extra_arrays or {}).items():
                mx.save_safetensors(str(temporary / name), arrays)
        except RuntimeError as error:  # mlx reports a failed write of a safetensors file this way
            raise OSError(f"{error}") from error
        utils.save_config(copy.deepcopy(config), temporary / "config.json")
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def switch_linear_class() -> type[nn.Module]:
    """mlx-lm's layer of stacked expert weights."""
    from mlx_lm.models.switch_layers import SwitchLinear

    return SwitchLinear


def quantized_switch_linear_class() -> type[nn.Module]:
    """mlx-lm's layer of stacked packed expert weights."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    return QuantizedSwitchLinear


def cache_module() -> Any:
    """mlx-lm's module of cache classes (KVCache, RotatingKVCache, CacheList, ArraysCache, ...)."""
    with open_file_limit_kept():
        import mlx_lm.models.cache
    return mlx_lm.models.cache


def new_cache(model: nn.Module) -> list[Any]:
    """Fresh caches of one row for every layer of ``model``, of the kinds its architecture asks for."""
    return list(cache_module().make_prompt_cache(model))


def masks_grouped_scores(model: nn.Module) -> bool:
    """Whether attention masks scores [B, kv heads, heads per kv head, q, T]: gemma2, which softcaps them itself.

    There the rows of a mask [B, 1, q, T] would meet the kv heads: an error, or with as many rows silently wrong.
    """
    if getattr(model, "model_type", None) != "gemma2":
        return False
    args: Any = model.args
    return bool(args.num_attention_heads != args.num_key_value_heads)


@functools.cache
def tool_parser_names() -> tuple[str, ...]:
    """Names of mlx-lm's tool-call parsers."""
    with open_file_limit_kept():
        import mlx_lm.tool_parsers
    return tuple(sorted(m.name for m in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)))


def tool_parser(name: str) -> Callable[[str, list[dict[str, Any]] | None], Any]:
    """mlx-lm's parser of one finished call's text: ``parse(text, tools)`` gives a dict or a list of dicts."""
    if name not in tool_parser_names():
        raise unknown("tool-call format", name, tool_parser_names())
    return importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call


def tool_format(tokenizer: Any) -> str | None:
    """Name of the parser that mlx-lm chose for this tokenizer's calls; None where it knows none."""
    return getattr(tokenizer, "init_kwargs", {}).get("tool_parser_type")


def lora_linear_class() -> type[nn.Module]:
    """mlx-lm's low-rank adapter around a linear layer."""
    from mlx_lm.tuner.lora import LoRALinear

    return LoRALinear


def dora_linear_class() -> type[nn.Module]:
    """mlx-lm's adapter of magnitude and direction around a linear layer."""
    from mlx_lm.tuner.dora import DoRALinear

    return DoRALinear


def _quietly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    # mlx-lm's quantisers print progress to stdout, which here is data.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **options)


def dwq(
    student: nn.Module, teacher: nn.Module, rows: Any, held_out: Any, *, rate: float, batch_size: int, dtype: mx.Dtype
) -> nn.Module:
    """mlx-lm's DWQ loop: train scales, biases and norms of a quantised model against a float one, in place.

    Args:
        rows, held_out: int arrays [n, width] of tokens; ``batch_size`` rows make a step, one pass.
        rate: Adam's learning rate.
        dtype: dtype in which the student computes.
    """
    with open_file_limit_kept():
        from mlx_lm.quant.dwq import dwq_quantize
    import mlx.optimizers as optim

    data, valid = ([(row.tolist(), 0) for row in part] for part in (rows, held_out))
    optimizer = optim.Adam(learning_rate=rate, bias_correction=True)
    _quietly(
        dwq_quantize,
        student,
        lambda batch, *_, **__: teacher(batch),
        optimizer,
        data,
        valid,
        batch_size,
        rows.shape[1],
        0,
        dtype=dtype,
    )
    return student


def awq(model: nn.Module, config: dict[str, Any], rows: mx.array, *, bits: int, group: int) -> dict[str, Any]:
    """mlx-lm's AWQ, in place, embeddings at the same width; returns the quantised model's config.

    Raises:
        UserError: mlx-lm has no AWQ for this family.
    """
    with open_file_limit_kept():
        from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config
    family = AWQ_MODEL_CONFIGS.get(config["model_type"])
    if family is None:
        known = ", ".join(sorted(AWQ_MODEL_CONFIGS))
        raise UserError(f"mlx-lm has no AWQ for {config['model_type']!r}", hint=f"it has one for: {known}")
    widths = {"group_size": group, "bits": bits, "embed_group_size": group, "embed_bits": bits}
    _quietly(awq_quantize, model, rows, family, **widths)
    return dict(update_config(model, copy.deepcopy(config)))


def gptq(model: nn.Module, config: dict[str, Any], rows: mx.array, *, bits: int, group: int) -> dict[str, Any]:
    """mlx-lm's GPTQ, in place, embeddings rounded at the same width; returns the quantised model's config."""
    with open_file_limit_kept():
        from mlx_lm.quant.gptq import gptq_quantize
    _, quantization = _quietly(gptq_quantize, model, rows, bits, group, bits, group)
    return {**copy.deepcopy(config), "quantization": quantization}


def add_lora(
    model: nn.Module,
    rank: int,
    scale: float,
    dropout: float,
    layers: int | None,
    keys: Any,
    dora: bool,
) -> None:
    """Replace linear layers of the last ``layers`` blocks (None: all) by mlx-lm's LoRA or DoRA layers, in place."""
    with open_file_limit_kept():
        from mlx_lm.tuner.utils import linear_to_lora_layers
    options = {"rank": rank, "scale": scale, "dropout": dropout} | ({} if keys is None else {"keys": set(keys)})
    linear_to_lora_layers(model, len(model.layers) if layers is None else layers, options, use_dora=dora)


def sample_batch(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    stop: set[int],
    sampler: Callable[[mx.array], mx.array],
    rows: int,
) -> list[list[int]]:
    """Completions by mlx-lm's continuous batching, in the order of the prompts, stop token included.

    Args:
        model: generates with its own caches.
        prompts: token ids, none empty.
        max_tokens: per completion.
        stop: ids that end a completion.
        sampler: log-probabilities [rows, V] to token ids [rows].
        rows: sequences that decode at once.
    """
    with open_file_limit_kept():
        from mlx_lm.generate import BatchGenerator
    engine = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in sorted(stop)],
        sampler=sampler,
        completion_batch_size=rows,
        prefill_batch_size=rows,
    )
    try:
        position = {uid: i for i, uid in enumerate(engine.insert(prompts))}
        found: list[list[int]] = [[] for _ in prompts]
        while responses := engine.next_generated():
            for response in responses:
                found[position[response.uid]].append(int(response.token))
    finally:
        engine.close()
    return found
