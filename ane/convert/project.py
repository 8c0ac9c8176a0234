"""One function of a bundle as a package of its own: what a compute plan can read."""

from __future__ import annotations

from pathlib import Path

from ane.convert.bundle import read_manifest
from mlxkd.errors import UserError, unknown
from mlxkd.runtime import quiet_coremltools


def project(bundle: str | Path, package: int, function: str, out: str | Path) -> None:
    """Write one function of one package as the only function, "main", of a new .mlpackage.

    Raises:
        UserError: no such package or function.
    """
    packages = read_manifest(bundle).packages
    if not 0 <= package < len(packages):
        raise UserError(f"package {package} does not exist; the bundle has {len(packages)}", where=str(bundle))
    if function not in packages[package].functions:
        raise unknown("function", function, packages[package].functions, where=str(bundle))
    single_function(Path(bundle) / packages[package].file, function, out)


def single_function(package: Path, function: str, out: str | Path) -> None:
    """The same for a package by itself; the function must exist."""
    with quiet_coremltools():
        from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

        descriptor = MultiFunctionDescriptor()
        descriptor.add_function(str(package), function, "main")
        descriptor.default_function_name = "main"
        save_multifunction(descriptor, str(out))
