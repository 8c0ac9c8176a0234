"""Checks of one record's fields: messages, tool calls and tool schemas, in the form chat templates want."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
from jsonschema.validators import validator_for

from mlxkd.errors import UserError, unknown

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def check_text(item: dict[str, Any], key: str, where: str) -> str:
    """The string under ``key``; raises UserError when it is absent or no string."""
    if key not in item:
        raise UserError(f"field {key!r} is missing", where=where)
    return _string(item[key], key, where)


def check_messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Messages with known roles and tool-call arguments as objects.

    Raises:
        UserError: names the field, e.g. ``messages[2].tool_calls[0].function.arguments``.
    """
    if not isinstance(value, list) or not value:
        raise UserError("field 'messages' must be a list with at least one message", where=where)
    return tuple(_message(message, f"messages[{i}]", where) for i, message in enumerate(value))


def check_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """OpenAI tool descriptions whose ``parameters`` are valid JSON Schemas of objects.

    A bare ``{"name", "parameters"}`` is wrapped into ``{"type": "function", "function": ...}``.

    Raises:
        UserError: names the field, e.g. ``tools[0].function.parameters.properties.city``.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError("field 'tools' must be a list", where=where)
    tools = tuple(_tool(tool, f"tools[{i}]", where) for i, tool in enumerate(value))
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"field 'tools': two tools are called {name!r}", where=where)
    return tools


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"field {field!r} must be a string, not {type(value).__name__}", where=where)
    return value


def _object(value: Any, field: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"field {field!r} must be an object, not {type(value).__name__}", where=where)
    return value


def _message(value: Any, field: str, where: str) -> dict[str, Any]:
    message = dict(_object(value, field, where))
    role = _string(message.get("role"), f"{field}.role", where)
    if role not in ROLES:
        raise unknown("role", role, ROLES, where=f"{where}: {field}.role")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"field '{field}.content' must be a string, a list of parts or null", where=where)
    if message.get("tool_calls") is None:
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{field}.tool_calls", where)
    if content is None and not message.get("tool_calls"):
        raise UserError(f"field '{field}' has neither content nor tool_calls", where=where)
    # Templates test `message.content` and concatenate it; null would print "None" in several of them.
    message["content"] = "" if content is None else content
    return message


def _tool_calls(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f"field {field!r} must be a list", where=where)
    calls = []
    for i, item in enumerate(value):
        call = dict(_object(item, f"{field}[{i}]", where))
        bare = "function" not in call
        function = {k: call.pop(k) for k in ("name", "arguments") if k in call} if bare else call["function"]
        inner = f"{field}[{i}]" if bare else f"{field}[{i}].function"
        function = dict(_object(function, inner, where))
        _string(function.get("name"), f"{inner}.name", where)
        function["arguments"] = _arguments(function.get("arguments", {}), f"{inner}.arguments", where)
        calls.append({**call, "type": call.get("type", "function"), "function": function})
    return calls


def _arguments(value: Any, field: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):  # the OpenAI form; a template would quote it a second time
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"field {field!r} is broken JSON: {error.msg}", where=where) from error
    return _object(value, field, where)


def _tool(value: Any, field: str, where: str) -> dict[str, Any]:
    tool = dict(_object(value, field, where))
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
        inner = field
    else:
        inner = f"{field}.function"
    function = dict(_object(tool.get("function"), inner, where))
    _string(function.get("name"), f"{inner}.name", where)
    parameters = _object(function.get("parameters", {}), f"{inner}.parameters", where)
    fault = _schema_fault(json.dumps(parameters))
    if fault:
        raise UserError(f"field '{inner}.parameters{fault[0]}' is no JSON Schema: {fault[1]}", where=where)
    return {**tool, "type": tool.get("type", "function"), "function": function}


@functools.lru_cache(maxsize=4096)
def _schema_fault(text: str) -> tuple[str, str] | None:
    """Where and how a JSON Schema breaks its own meta-schema; None when it is sound. Data repeats schemas."""
    schema = json.loads(text)
    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    error = jsonschema.exceptions.best_match(validator(validator.META_SCHEMA).iter_errors(schema))
    if error is None:
        return None
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    return path, error.message
