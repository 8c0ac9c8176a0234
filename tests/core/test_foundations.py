"""Files are written whole or not at all; figures carry their method; listings are folders."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import mlxkd
from mlxkd import registry, runtime
from mlxkd.errors import UserError
from mlxkd.files import atomic_file, atomic_folder, write_json
from mlxkd.metric import Metric, from_samples


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_json(target, {"a": 1})
    with pytest.raises(UserError, match="No space left") as caught, atomic_file(target) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert "free space" in str(caught.value)
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "student"
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
        raise RuntimeError("killed")
    assert (target / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"


def test_a_real_full_disk_is_one_clear_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="cannot write"), atomic_file(Path("/dev/full/report.json")):
        pass


def test_a_metric_needs_a_method_a_device_and_a_reason() -> None:
    with pytest.raises(ValueError, match="method"):
        Metric(1.0, "s", "guessed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device"):
        Metric(1.0, "s", "measured")
    with pytest.raises(ValueError, match="why"):
        Metric(None, "s", "predicted")


def test_censored_observations_sit_at_infinity() -> None:
    metric = from_samples([1.0, 2.0, 3.0], "ms", method="simulated", device=None, censored=2)
    assert (metric.p50, metric.p95, metric.n, metric.censored) == (3.0, math.inf, 5, 2)
    assert metric.to_json()["p95"] == "inf"
    assert from_samples([], "ms", method="simulated", device=None).value is None


def test_a_listing_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "colours"
    package.mkdir()
    for name in ("__init__", "red", "green", "_private"):
        (package / f"{name}.py").write_text("X = 1\n")
    (package / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import colours  # type: ignore[import-not-found]

    assert registry.listing(colours) == ("broken", "green", "red")
    assert registry.member(colours, "red").X == 1
    with pytest.raises(UserError, match="did you mean 'green'"):
        registry.member(colours, "grene")
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        registry.member(colours, "broken")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_mlx_lm_does_not_lower_the_open_file_limit() -> None:
    code = (
        "import resource, mlxkd; from mlxkd import compat; before = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "compat._mlx_lm_utils(); print(before == resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert _python(code).strip() == "True"


def test_importing_mlxkd_imports_no_mlx() -> None:
    assert _python("import sys, mlxkd; print('mlx.core' in sys.modules)").strip() == "False"


def test_coremltools_is_imported_without_chatter() -> None:
    code = "from mlxkd.runtime import import_coremltools as i; print(i().__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "coremltools" and "Failed to load" not in found.stderr


def test_versions_name_what_shapes_an_artefact() -> None:
    found = runtime.artefact_metadata()
    assert found["versions"]["mlx"] and found["device"] and mlxkd.__version__
