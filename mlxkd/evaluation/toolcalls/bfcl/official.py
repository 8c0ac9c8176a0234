"""The leaderboard's own checker, when it is installed: the peer that ours is compared with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

from mlxkd.evaluation.toolcalls.bfcl.categories import language
from mlxkd.evaluation.toolcalls.bfcl.reader import Case
from mlxkd.evaluation.toolcalls.parsing import Call

INSTALL = "pip install --no-deps bfcl-eval"
_MODELS = "bfcl_eval.constants.model_config"


class _AnyModel(dict[str, types.SimpleNamespace]):
    """Stands for the table of served models, whose import needs some thirty vendor packages."""

    def __missing__(self, key: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(underscore_to_dot=False)


def official_checker() -> Callable[[Case, list[Call]], bool] | None:
    """``check(case, calls) -> valid`` by the installed bfcl-eval, or None when there is none.

    Where the checker itself fails (it calls ``.items()`` on whatever stands in a list of objects), the answer
    counts as invalid.
    """
    if importlib.util.find_spec("bfcl_eval") is None:
        return None
    stub = types.ModuleType(_MODELS)
    stub.MODEL_CONFIG_MAPPING = _AnyModel()  # type: ignore[attr-defined]
    before = sys.modules.get(_MODELS)
    sys.modules[_MODELS] = stub
    try:
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        languages = importlib.import_module("bfcl_eval.constants.enums").Language
    finally:
        del sys.modules[_MODELS]
        if before is not None:
            sys.modules[_MODELS] = before

    def check(case: Case, calls: list[Call]) -> bool:
        made = [{call.name: call.arguments} for call in calls]
        spoken = languages[language(case.category).upper()]
        try:
            verdict = checker.ast_checker(list(case.functions), made, list(case.answers), spoken, case.category, "any")
        except (AttributeError, TypeError, KeyError, IndexError):
            return False
        return bool(verdict["valid"])

    return check


def official_data() -> Path | None:
    """Folder of the cases that come with the installed bfcl-eval, or None."""
    found = importlib.util.find_spec("bfcl_eval")
    return Path(found.origin).parent / "data" if found and found.origin else None
