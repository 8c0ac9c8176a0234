"""Running bundles: one session, several engines (the MIL reference runtime anywhere, Core ML on macOS)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxkd.errors import UserError

if TYPE_CHECKING:
    from ane.runtime.bundle_session import BundleSession

Backend = Literal["auto", "mil", "coreml"]
ENGINES = {"mil": "mil_session", "coreml": "coreml"}

__all__ = ["Backend", "open_session"]


def open_session(bundle: str | Path, backend: Backend = "auto", batch: int = 1, **options: Any) -> BundleSession:
    """A decoding session on a bundle.

    Args:
        bundle: a folder that `mlxkd export --to coreml` wrote.
        backend: "mil" anywhere, "coreml" on macOS; "auto" takes Core ML where it exists.
        batch: rows; one of the batch sizes the bundle was exported with.
        options: of the engine's ``open_package``.

    Raises:
        UserError: no bundle, or a batch size or backend it does not have.
    """
    # ane.convert describes caches with ane.runtime.kv, so its manifest is imported here.
    from ane.convert.bundle import read_manifest
    from ane.runtime.bundle_session import BundleSession

    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if batch not in manifest.batches:
        raise UserError(
            f"batch {batch} was not exported; the bundle has {', '.join(map(str, manifest.batches))}",
            where=str(bundle),
            hint="export again with --batch",
        )
    chosen = backend if backend != "auto" else ("coreml" if sys.platform == "darwin" else "mil")
    if chosen not in ENGINES:
        raise UserError(f"backend {chosen!r} is not one of auto, {', '.join(ENGINES)}", where="--backend")
    engine = importlib.import_module(f"ane.runtime.{ENGINES[chosen]}")
    packages = [engine.open_package(bundle / package.file, **options) for package in manifest.packages]
    return BundleSession(bundle, manifest, packages, batch)
