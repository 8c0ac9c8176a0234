"""Prepare the process for MLX: BLAS, device, limits, and what a doctor needs to know.

This module is imported before mlx and imports it only inside functions.

The Linux wheel of MLX links the reference BLAS; loading OpenBLAS, BLIS or MKL with global
symbols first makes its fp32 matrix product about 30 times faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLAS_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libblis.so.4", "libblis.so", "libmkl_rt.so.2", "libmkl_rt.so")
VERSIONED_PACKAGES = ("mlxkd", "mlx", "mlx-lm", "coremltools", "numpy", "transformers", "sentencepiece")

_loaded_blas: str | None = None


def preload_blas() -> str | None:
    """Load a fast BLAS with global symbols; returns its library name, or None.

    Only on Linux and only before mlx is imported: later the wheel's own symbols are bound already.
    MLXKD_BLAS names another library, or "none" to leave the wheel's own.
    """
    global _loaded_blas
    if _loaded_blas or platform.system() != "Linux" or "mlx.core" in sys.modules:
        return _loaded_blas
    chosen = os.environ.get("MLXKD_BLAS")
    for name in (chosen,) if chosen else BLAS_LIBRARIES:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            _loaded_blas = name
            break
    return _loaded_blas


def keep_heap() -> None:
    """Tell glibc to keep freed memory for the next array instead of returning it page by page.

    MLX's CPU backend has no cache of its own: a small training step otherwise takes tens of thousands of page
    faults. Elsewhere than on Linux with glibc this does nothing.
    """
    libc_mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if libc_mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc_mallopt(parameter, value)


def parallel_streams(count: int) -> list[Any]:
    """``count`` MLX streams for work that can run side by side.

    MLX computes elementwise operations of one CPU stream on one core, so independent halves of a batch finish
    sooner on two streams. They are distinct only on a CPU with that many cores; BLAS then takes one thread each.
    """
    import mlx.core as mx

    default = mx.default_stream(mx.default_device())
    if mx.default_device().type != mx.DeviceType.cpu or usable_cores() < count:
        return [default] * count
    set_blas_threads(max(1, usable_cores() // count))
    return [default, *_extra_cpu_streams(count - 1)]


@functools.cache
def _extra_cpu_streams(count: int) -> tuple[Any, ...]:
    """Made once: every stream is a thread that stays."""
    import mlx.core as mx

    return tuple(mx.new_stream(mx.cpu) for _ in range(count))


def row_streams() -> list[Any]:
    """Streams for the rows of a training batch: one a core, at most four; a single one on a GPU."""
    import mlx.core as mx

    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return parallel_streams(min(usable_cores(), 4) if on_cpu else 1)


def set_blas_threads(count: int) -> None:
    """How many threads one matrix product may take; only OpenBLAS can be told after loading."""
    if _loaded_blas and "openblas" in _loaded_blas:
        ctypes.CDLL(_loaded_blas).openblas_set_num_threads(count)


def blas_in_use() -> str:
    """The BLAS behind MLX's CPU matrix product, in words."""
    if platform.system() == "Darwin":
        return "Accelerate"
    return _loaded_blas or "reference BLAS of the mlx wheel (about 30x slower)"


@contextlib.contextmanager
def open_file_limit_kept() -> Iterator[None]:
    """Keep what an import inside the block would do to RLIMIT_NOFILE from happening (mlx_lm.utils sets 2048/4096).

    An unprivileged process cannot raise a lowered hard limit again, so the call itself is held off, for this block.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Swallow coremltools' import chatter about libraries that exist only on macOS."""
    import logging

    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def import_coremltools() -> Any:
    """The coremltools module, imported without its chatter."""
    with quiet_coremltools():
        import coremltools
    return coremltools


def worker_environment() -> dict[str, str]:
    """The environment of a Python process that must import the same copy of this project as this one."""
    root = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}


def device_name() -> str:
    """The device MLX computes on, as a person would name it, e.g. "Apple M4 Max GPU" or "AMD EPYC CPU (2 cores)"."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:
        info: dict[str, Any] = dict(mx.device_info(mx.Device(mx.DeviceType.gpu)))
        return f"{info.get('device_name', 'unknown')} GPU"
    return f"{cpu_name()} CPU ({usable_cores()} cores)"


def cpu_name() -> str:
    """The processor's brand name."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        libc = ctypes.CDLL("libc.dylib")
        size = ctypes.c_size_t(256)
        name = ctypes.create_string_buffer(256)
        if libc.sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0) == 0:
            return name.value.decode()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """CPU cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def total_memory() -> int | None:
    """Physical memory in bytes, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def peak_process_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str | None]:
    """Versions of the packages that shape an artefact; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class Limits:
    """Memory limits in bytes; None leaves MLX's own default."""

    memory: int | None = None
    cache: int | None = None
    wired: int | None = None


def set_device(name: str | None = None) -> None:
    """Choose MLX's default device: "cpu", "gpu" or None for MLX's own choice.

    Raises:
        UserError: "gpu" where this MLX build has none.
    """
    import mlx.core as mx

    from mlxkd.errors import UserError

    if name is None:
        return
    if name == "gpu" and not mx.is_available(mx.Device(mx.DeviceType.gpu)):
        raise UserError("this MLX build has no GPU backend", hint="use --device cpu, or run `mlxkd doctor`")
    mx.set_default_device(mx.Device(mx.DeviceType.gpu if name == "gpu" else mx.DeviceType.cpu))


def set_limits(limits: Limits) -> None:
    """Apply memory limits; the wired limit exists on Metal only and is left alone elsewhere."""
    import mlx.core as mx

    if limits.memory is not None:
        mx.set_memory_limit(limits.memory)
    if limits.cache is not None:
        mx.set_cache_limit(limits.cache)
    if limits.wired is not None and mx.metal.is_available():
        mx.set_wired_limit(limits.wired)


def artefact_metadata() -> dict[str, Any]:
    """Who made a file: versions, device, BLAS, platform. Every artefact carries it."""
    return {
        "versions": versions(),
        "device": device_name(),
        "blas": blas_in_use(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
