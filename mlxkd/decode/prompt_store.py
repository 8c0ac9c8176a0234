"""Prompt caches on disk: one safetensors file with a checksum, bound to model, tokenizer and grid."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkd.decode.prompt_cache import Node, PromptCache, joined
from mlxkd.decode.session import Snapshot
from mlxkd.errors import UserError
from mlxkd.files import atomic_file, file_hash
from mlxkd.runtime import versions

FORMAT = 1
KEYED_FILES = re.compile(
    r".*\.safetensors|.*\.mlpackage/.*|config\.json|manifest\.json|mlxkd\.json|tokenizer.*|chat_template.*"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|adapter.*"
)


class StaleCache(UserError):
    """A cache file that belongs to something else, or is damaged. Nothing was loaded."""


def model_key(folder: Path, layout: str) -> str:
    """What a cached state depends on, as one hash.

    Weights with their grid, adapter and architecture (all bytes of the folder's files), tokenizer and chat
    template, the session's layout, and the versions whose kernels computed the state.

    Args:
        folder: a model folder or a bundle.
        layout: ``Session.layout``.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    used = {name: file_hash(path) for name, path in named.items() if KEYED_FILES.fullmatch(name)}
    minor = {name: ".".join((versions()[name] or "").split(".")[:2]) for name in ("mlx", "mlx-lm", "coremltools")}
    content = json.dumps([used, layout, minor], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def save(cache: PromptCache, key: str, path: Path) -> int:
    """Write one model's part of the cache, whole or not at all; returns the bytes of its states.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    nodes = list(cache.root(key).descendants())
    numbers = {id(node): i for i, node in enumerate(nodes)}
    arrays: dict[str, mx.array] = {}
    entries: list[dict[str, Any]] = []
    for i, node in enumerate(nodes):
        arrays[f"{i}/tokens"] = mx.array(node.tokens)
        entry: dict[str, Any] = {"parent": numbers.get(id(node.parent), -1), "used": node.used}
        if node.state is not None:
            entry["state"] = _describe(node.state)
            arrays |= {f"{i}/state/{name}": mx.array(array) for name, array in node.state.arrays.items()}
        entries.append(entry)
    header = {"format": FORMAT, "key": key, "nodes": entries}
    text = json.dumps(header)
    with atomic_file(path.with_suffix(".safetensors")) as temporary:
        mx.save_safetensors(str(temporary), arrays, {"header": text, "sha256": _checksum(text, arrays)})
    return sum(node.nbytes for node in nodes)


def load(cache: PromptCache, key: str, path: Path) -> int:
    """Read a file into the cache; returns the tokens of its newest parts.

    Raises:
        StaleCache: written for another model, tokenizer, grid or version, or damaged; says which.
        UserError: no such file.
    """
    path = path.with_suffix(".safetensors")
    if not path.is_file():
        raise UserError("no such prompt cache", where=str(path))
    header, arrays = _read(path)
    if header.get("format") != FORMAT:
        raise StaleCache(f"written in format {header.get('format')}, this is {FORMAT}", where=str(path))
    if header["key"] != key:
        raise StaleCache("written for another model, tokenizer, grid, session layout or version", where=str(path))
    nodes: list[Node] = []
    for i, entry in enumerate(header["nodes"]):
        parent = nodes[entry["parent"]] if entry["parent"] >= 0 else Node(np.zeros(0, dtype=np.int32), None)
        node = Node(np.array(arrays[f"{i}/tokens"], dtype=np.int32), parent)
        node.used = entry["used"]
        if "state" in entry:
            node.state = _restored(entry["state"], i, arrays)
        parent.children[int(node.tokens[0])] = node
        nodes.append(node)
    return sum(_insert(cache, key, node) for node in sorted(nodes, key=lambda node: node.used))


def _insert(cache: PromptCache, key: str, node: Node) -> int:
    """Through the front door, oldest first, so that budget and order of use are respected; returns new tokens."""
    path = node.path()
    states = [part.state for part in path if part.state is not None]
    if node.state is None or (node.state.can_cut and node.children):
        return 0  # covered by the leaves below
    state = joined(states) if node.state.can_cut else node.state
    return len(node.tokens) if cache.insert(key, np.concatenate([part.tokens for part in path]).tolist(), state) else 0


def _describe(state: Snapshot) -> dict[str, Any]:
    return {"length": state.length, "start": state.start, "layout": state.layout, "axes": state.token_axis}


def _restored(entry: dict[str, Any], number: int, arrays: dict[str, mx.array]) -> Snapshot:
    found = {name: arrays[f"{number}/state/{name}"] for name in entry["axes"]}
    return Snapshot(entry["length"], found, entry["axes"], entry["layout"], entry["start"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        text = metadata["header"]
        good = metadata["sha256"] == _checksum(text, arrays)
    except (RuntimeError, ValueError, KeyError) as error:
        raise StaleCache(f"damaged: {error}", where=str(path)) from error
    if not good:
        raise StaleCache("damaged: its checksum does not match", where=str(path))
    return json.loads(text), arrays


def _checksum(header: str, arrays: dict[str, mx.array]) -> str:
    """SHA-256 over the header and every array's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        if array.size:
            digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()
