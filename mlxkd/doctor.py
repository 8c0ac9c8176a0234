"""What this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlxkd import runtime

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One check.

    Args:
        id: stable name.
        status: "error" when training cannot work, "warning" when it works badly.
        observed: what was found.
        fix: the command or step that mends it.
    """

    id: str
    status: Status
    observed: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _python() -> Finding:
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "python", "ok" if fine else "error", platform.python_version(), None if fine else "use Python 3.11–3.13"
    )


def _packages() -> Finding:
    found = runtime.versions()
    missing = [name for name, version in found.items() if version is None and name not in ("mlxkd", "transformers")]
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        return Finding("packages", "error", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding("packages", "ok", shown)


def _mlx() -> Finding:
    """Multiply two matrices on the default device, for real."""
    extra = "metal" if sys.platform == "darwin" else "cpu"
    fix = "pip install mlx" if extra == "metal" else "pip install 'mlx[cpu]' (or mlx[cuda12], mlx[cuda13])"
    try:
        import mlx.core as mx

        product = mx.ones((64, 64)) @ mx.ones((64, 64))
        right = product[0, 0].item() == 64.0
    except (ImportError, RuntimeError, OSError) as error:
        return Finding("mlx", "error", f"does not work: {error}", fix)
    if not right:
        return Finding("mlx", "error", "a matrix product came out wrong", fix)
    return Finding("mlx", "ok", f"computes on {runtime.device_name()}")


def _blas() -> Finding:
    used = runtime.blas_in_use()
    if "reference" not in used:
        return Finding("blas", "ok", used)
    return Finding("blas", "warning", used, "sudo apt-get install libopenblas0-pthread")


def _compiler() -> Finding:
    """MLX's CPU backend builds fused kernels with the system's C++ compiler."""
    if sys.platform == "darwin" or shutil.which("g++"):
        return Finding("compiler", "ok", "not needed" if sys.platform == "darwin" else "g++")
    return Finding("compiler", "warning", "no g++: fused CPU kernels are off", "sudo apt-get install g++")


def _memory() -> Finding:
    total = runtime.total_memory()
    if total is None:
        return Finding("memory", "warning", "the system does not say how much there is")
    status: Status = "ok" if total >= 4e9 else "warning"
    return Finding("memory", status, f"{total / 1e9:.1f} GB", None if status == "ok" else "use smaller shapes")


def _teacher() -> Finding:
    from mlxkd.demo import DEMO_TEACHER

    fine = (DEMO_TEACHER / "model.safetensors").is_file()
    fix = None if fine else "reinstall mlxkd; the demo teacher is missing"
    return Finding("demo teacher", "ok" if fine else "error", "present" if fine else "missing", fix)


CHECKS: tuple[Callable[[], Finding], ...] = (_python, _packages, _mlx, _blas, _compiler, _memory, _teacher)


def examine() -> list[Finding]:
    """Run every check."""
    return [check() for check in CHECKS]
