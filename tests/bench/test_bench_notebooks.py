"""The notebooks, executed as a person would, on small settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))


def execute(name: str, folder: Path, **settings: Any) -> Any:
    """Run a notebook from the repository's root; the executed copy."""
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MLXKD_RUNS", str(folder))
        for key, value in settings.items():
            patch.setenv(key, str(value))
        nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return book


def pages(book: Any) -> list[str]:
    """The HTML that the cells displayed."""
    return [
        o["data"]["text/html"] for c in book.cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})
    ]


def test_there_are_two_and_they_ship_without_outputs() -> None:
    assert NOTEBOOKS == ["distil_and_look.ipynb", "mlx_or_ane.ipynb"]
    for name in NOTEBOOKS:
        book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        nbformat.validate(book)
        assert not any(c.get("outputs") for c in book.cells)


@pytest.mark.slow
def test_distil_and_look(stories_model: Path, stories_text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\nteacher: {{model: {stories_model}}}\nstudent: {{layers: [0, 2, 4]}}\n"
        f"data: {{train: {stories_text}, limit: 40, shapes: [[4, 64]]}}\n"
        "loss: [{name: forward_kl}]\nquantisation: {grid: mlx-affine4-g32, rules: [['*down_proj', float]]}\n"
        "training: {steps: 6, evaluate_every: 2, evaluate_batches: 1, save_every: 6}\nevaluation: {batches: 1}\n"
    )
    shown = pages(execute("distil_and_look.ipynb", tmp_path, MLXKD_RECIPE=recipe))
    assert len(shown) == 5
    assert "KL by step" in shown[1] and "layer cosines" in shown[2] and "student, unpacked" in shown[3]


@pytest.mark.slow
def test_distil_and_look_on_the_demo(tmp_path: Path) -> None:
    small = (
        "training.steps=4 training.evaluate_every=2 training.save_every=4 evaluation.tool_calls=2 data.demo.train=64"
    )
    shown = pages(execute("distil_and_look.ipynb", tmp_path, MLXKD_OVERRIDES=small))
    assert len(shown) == 5 and "assistant" in shown[4]


@pytest.mark.slow
def test_mlx_or_ane(stories_model: Path, tmp_path: Path) -> None:
    book = execute(
        "mlx_or_ane.ipynb", tmp_path, MLXKD_STUDENT=stories_model, MLXKD_BUNDLE=tmp_path / "bundle", MLXKD_BENCH="1 2 4"
    )
    shown = pages(book)
    assert "Operations that fall off" in shown[0] and "predicted" in shown[0]
    assert "Cannot tell from here" in shown[1] and "not available here: needs macOS" in shown[1]
    assert "tpot_ms p50" in shown[2]
