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
