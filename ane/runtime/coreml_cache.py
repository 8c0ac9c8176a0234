"""Compiled Core ML models on disk, found by the content of their packages: the first compile happens once."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from mlxkd.errors import UserError
from mlxkd.files import atomic_folder, file_hash
from mlxkd.runtime import import_coremltools, versions

Compiler = Callable[[Path, Path], None]
"""Compiles a .mlpackage into a .mlmodelc."""

MODEL_NAME = "model.mlmodelc"
DEFAULT_BUDGET = 20 * 2**30
"""Bytes kept before the least recently opened models go."""


def default_root() -> Path:
    """~/Library/Caches/mlxkd/compiled, or the folder named by MLXKD_COMPILED."""
    named = os.environ.get("MLXKD_COMPILED")
    return Path(named).expanduser() if named else Path.home() / "Library" / "Caches" / "mlxkd" / "compiled"


def compile_package(package: Path, target: Path) -> None:
    """Compile with coremltools (macOS).

    Raises:
        UserError: Core ML refuses the package.
    """
    try:
        import_coremltools().models.utils.compile_model(str(package), str(target))
    except RuntimeError as error:
        raise UserError(f"Core ML cannot compile this package: {error}", where=str(package)) from error


class CompiledModels:
    """A folder of compiled models.

    Args:
        root: the folder; default ``default_root()``.
        budget: bytes kept.
        compiler: turns a package into a compiled model.
    """

    def __init__(self, root: Path | None = None, budget: int = DEFAULT_BUDGET, compiler: Compiler = compile_package):
        self.root = root or default_root()
        self.budget, self._compile = budget, compiler

    def open(self, package: Path) -> Path:
        """The compiled model of a package, compiled now if this content was never seen on this system.

        Raises:
            UserError: the package is missing or Core ML refuses it; the disk is full.
        """
        folder = self.root / self.key(package)
        if not (folder / MODEL_NAME).is_dir():
            with atomic_folder(folder) as temporary:
                self._compile(package, temporary / MODEL_NAME)
            self._prune(keep=folder)
        os.utime(folder)
        return folder / MODEL_NAME

    def key(self, package: Path) -> str:
        """Hash of the package's files, of the system and of coremltools: what a compiled model depends on.

        Raises:
            UserError: no such package.
        """
        if not package.is_dir():
            raise UserError("no such package", where=str(package))
        digest = hashlib.sha256()
        for path in sorted(path for path in package.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(package)} {file_hash(path)}\n".encode())
        digest.update(f"{platform.mac_ver()[0]} {platform.machine()} {versions()['coremltools']}".encode())
        return digest.hexdigest()[:32]

    def _prune(self, keep: Path) -> None:
        """Remove the least recently opened models beyond the budget, never ``keep``."""
        folders = sorted((f for f in self.root.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
        sizes = {f: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders}
        for folder in folders:
            if sum(sizes.values()) <= self.budget:
                break
            if folder != keep:
                shutil.rmtree(folder)
                del sizes[folder]
