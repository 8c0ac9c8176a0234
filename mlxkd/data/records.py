"""Read the data formats that mlx-lm users have; every fault names file, line and field.

JSON lines of ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages", "tools"}``, arrays of the same in
a .json file, plain .txt files (one document each), and folders of these. A folder that holds ``train.*`` is
read as mlx-lm reads it: one file per split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxkd.data.fields import check_messages, check_text, check_tools
from mlxkd.errors import UserError

SUFFIXES = (".jsonl", ".json", ".txt")
SHAPES = '{"text": …}, {"prompt": …, "completion": …} or {"messages": […], "tools": […]}'


@dataclass(frozen=True)
class Record:
    """One conversation, completion or document, checked but not yet rendered.

    Args:
        kind: which of the three shapes it has.
        text: the document (kind "text").
        prompt, completion: kind "completion".
        messages: chat messages; ``tool_calls[].function.arguments`` are objects, never JSON strings.
        tools: OpenAI tool descriptions ``{"type": "function", "function": {...}}``.
        source: "file:line".
        extra: the other keys of the JSON object, untouched.
    """

    kind: Literal["text", "completion", "messages"]
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def load_records(path: str | Path, limit: int | None = None, *, split: str = "train") -> list[Record]:
    """Read records from a file or a folder.

    Args:
        path: a .jsonl, .json or .txt file, or a folder of them.
        limit: stop after this many records.
        split: which file of a folder in mlx-lm's layout (``train.jsonl``, ``valid.jsonl``, ``test.jsonl``).

    Raises:
        UserError: nothing there, an unknown suffix, an empty file, broken JSON, or a field of the wrong
            type or shape; names file, line and field.
    """
    found: list[Record] = []
    for file in _files(Path(path).expanduser(), split):
        before = len(found)
        for record in _read(file):
            found.append(record)
            if limit is not None and len(found) >= limit:
                return found
        if len(found) == before:
            raise UserError("this file holds no records", where=str(file), hint=f"each line is one of {SHAPES}")
    return found


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"cannot read {path.suffix or 'a file without suffix'} data",
                where=str(path),
                hint=f"known: {', '.join(SUFFIXES)}",
            )
        return [path]
    if not path.is_dir():
        raise UserError("no such data file or folder", where=str(path))
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError("this folder holds no data", where=str(path), hint=f"known: {', '.join(SUFFIXES)}")
    if any(p.stem == "train" for p in files):
        chosen = [p for p in files if p.stem == split]
        if not chosen:
            raise UserError(f"this folder has no {split!r} split", where=str(path))
        return chosen
    return files


def _read(file: Path) -> Iterator[Record]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError("this is not UTF-8 text", where=f"{file}:{line}") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from error
    if file.suffix == ".txt":
        if text.strip():
            yield Record("text", text=text.strip("\n"), source=str(file))
    elif file.suffix == ".json" and text.lstrip().startswith("["):
        yield from _array(text, file)
    else:
        # split("\n"), not splitlines(): U+2028 and its kin may stand inside a JSON string.
        for number, row in enumerate(text.split("\n"), 1):
            if row.strip():
                yield _record(_parse(row, f"{file}:{number}"), f"{file}:{number}")


def _array(text: str, file: Path) -> Iterator[Record]:
    items = _parse(text, str(file))
    for index, item in enumerate(items):
        yield _record(item, f"{file}:[{index}]")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1:
            where = f"{where}:{error.lineno}"
        raise UserError(f"broken JSON at column {error.colno}: {error.msg}", where=where) from error
    except RecursionError as error:
        raise UserError("JSON nested too deeply", where=where) from error


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise UserError(f"a record must be an object, not {type(item).__name__}", where=where, hint=f"use {SHAPES}")
    if "messages" in item:
        messages = check_messages(item["messages"], where)
        tools = check_tools(item.get("tools"), where)
        return Record("messages", messages=messages, tools=tools, source=where, extra=_rest(item, "messages", "tools"))
    if "prompt" in item or "completion" in item:
        prompt, completion = (check_text(item, key, where) for key in ("prompt", "completion"))
        tools = check_tools(item.get("tools"), where)
        rest = _rest(item, "prompt", "completion", "tools")
        return Record("completion", prompt=prompt, completion=completion, tools=tools, source=where, extra=rest)
    if "text" in item:
        return Record("text", text=check_text(item, "text", where), source=where, extra=_rest(item, "text"))
    keys = ", ".join(map(repr, item)) or "none"
    raise UserError(f"no known shape (keys: {keys})", where=where, hint=f"use {SHAPES}")


def _rest(item: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in used}
