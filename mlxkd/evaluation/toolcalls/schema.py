"""Do a call's arguments satisfy the schema of the tool it names?"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

import jsonschema
from jsonschema.validators import validator_for

from mlxkd.evaluation.toolcalls.parsing import Call


def fault(call: Call, tools: Iterable[dict[str, Any]]) -> str | None:
    """Why the call is not valid for the tools on offer; None when it is.

    Args:
        call: a parsed call.
        tools: OpenAI descriptions, ``{"type": "function", "function": {"name", "parameters"}}``.
    """
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == call.name:
            error = next(
                iter(_validator(json.dumps(function.get("parameters") or {})).iter_errors(call.arguments)), None
            )
            return None if error is None else f"{_path(error)}: {error.message}"
    return f"no tool is called {call.name!r}"


@functools.lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    parameters = json.loads(schema)
    return validator_for(parameters, default=jsonschema.Draft202012Validator)(parameters)


def _path(error: jsonschema.ValidationError) -> str:
    return ".".join(map(str, error.absolute_path)) or "arguments"
