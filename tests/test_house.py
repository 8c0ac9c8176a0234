"""The house rules that a machine can check: import direction, module and function size."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"mlxkd": {"ane", "bench"}, "ane": {"bench"}, "bench": set()}
MODULES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]
# mlxkd reaches ane only lazily, inside the functions of its command line and its residency-free exporter door.
LAZY_DOORS = {"mlxkd/cli.py", "mlxkd/export.py", "mlxkd/decode/opening.py"}


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text())
    if name in LAZY_DOORS:
        tree = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not _imports(tree) & FORBIDDEN[name.split("/")[0]]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines: split it by reason to change"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("room", ["mlxkd/decode", "mlxkd/report", "ane/residency", "bench"])
def test_no_module_imports_itself_through_others(room: str) -> None:
    """Imports inside functions and for types alone count too: they hide a circle, they do not open it."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / room).rglob("*.py")}
    modules = {name: path for name, path in modules.items() if not name.endswith("__init__")}
    needs = {name: _needed(path, set(modules)) for name, path in modules.items()}
    while free := {name for name, wanted in needs.items() if not wanted & needs.keys()}:
        needs = {name: wanted for name, wanted in needs.items() if name not in free}
    assert not needs, f"these import each other in a circle: {sorted(needs)}"


def _needed(path: Path, modules: set[str]) -> set[str]:
    """The modules of ``modules`` that a file imports, by any spelling."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules
