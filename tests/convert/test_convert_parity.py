"""A bundle on the reference runtime says what MLX says: same greedy tokens, nearly the same distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_models import packed, student

from ane.convert import families
from ane.convert.check import divergence, reference
from ane.convert.export import export
from ane.convert.options import Options
from ane.runtime import open_session
from mlxkd import compat

STEPS = 200
PROMPT = 9
# Each option at each of its values with some family; the full product is the slow test below.
CHOICES: dict[str, dict[str, Any]] = {
    "llama": {"head_width": 40},
    "mistral": {"kv": "explicit", "chunks": 2},
    "qwen2": {"profile": "gpu"},
    "qwen3": {"chunks": 3, "positions": "model"},
    "smollm3": {"profile": "gpu", "kv": "explicit", "embedding": "host"},
    "gemma2": {"embedding": "model", "target": "iOS26"},
    "gemma3_text": {"verify": 4},
}


def agrees(got: np.ndarray, expected: np.ndarray) -> bool:
    """Same greedy token; or a tie, where the two best lie within four float16 steps of each other."""
    ours, theirs = int(got.argmax()), int(expected.argmax())
    return ours == theirs or expected[theirs] - expected[ours] <= 4 * np.spacing(np.float16(expected[theirs]))


def follow(folder: Path, bundle: Path, steps: int) -> tuple[int, float]:
    """(first step whose greedy token differs or ``steps``, worst KL), feeding both MLX's tokens."""
    theirs, ours = reference(folder), open_session(bundle, "mil")
    tokens = np.random.default_rng(1).integers(0, theirs.vocab_size, (1, PROMPT))
    worst = 0.0
    for step in range(steps):
        expected, got = np.array(theirs.extend(tokens)), ours.extend(tokens)
        worst = max(worst, divergence(expected, got))
        tokens = expected[:, -1:].argmax(-1)
        if not agrees(got[0, -1], expected[0, -1]):
            return step, worst
    return steps, worst


@pytest.mark.parametrize("family", families.names())
def test_every_family_decodes_as_mlx(family: str, toy: Any, tmp_path: Path) -> None:
    folder = toy(family)
    export(folder, tmp_path / "bundle", Options(context=224, prefill=16, **CHOICES[family]))
    same, worst = follow(folder, tmp_path / "bundle", STEPS)
    assert same == STEPS
    assert worst < 1e-3


def test_the_divergence_is_the_textbook_one() -> None:
    """Against scipy; log of a product rule error would show at once."""
    from scipy.special import softmax
    from scipy.stats import entropy

    a, b = np.random.default_rng(0).normal(size=(2, 3, 7))
    assert divergence(a, b) == pytest.approx(entropy(softmax(a, -1), softmax(b, -1), axis=-1).max())


def test_the_real_model_reproduces_its_published_text(stories_model: Path, tmp_path: Path) -> None:
    export(stories_model, tmp_path / "bundle", Options(context=512))
    session = open_session(tmp_path / "bundle", "mil")
    tokens, produced = np.array([[1]]), []
    for _ in range(STEPS):
        tokens = session.extend(tokens)[:, -1:].argmax(-1)
        produced.append(int(tokens[0, 0]))
    text = compat.load_tokenizer(tmp_path / "bundle", {"eos_token_id": 2}).decode(produced)
    assert text.strip() == (stories_model / "expected_greedy.txt").read_text().strip()


WIDE = {"hidden_size": 64, "intermediate_size": 128}
GRIDS = {"ane": ("float", "ane-int8", "ane-lut4"), "gpu": ("float", "affine4")}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kv", ["state", "explicit"])
@pytest.mark.parametrize(("profile", "weights"), [(p, w) for p, found in GRIDS.items() for w in found])
@pytest.mark.parametrize("family", families.names())
def test_every_combination_follows_mlx(
    family: str, profile: str, weights: str, kv: str, chunks: int, batch: int, toy: Any, tmp_path: Path
) -> None:
    """Rows of different lengths, a rewind in the middle, then greedy tokens of MLX."""
    folder = toy(family, **WIDE)
    if weights == "affine4":
        folder = packed(folder, tmp_path / "source", 4, 32)
    elif weights != "float":
        folder = student(folder, tmp_path / "source", weights)
    options = Options(profile=profile, kv=kv, chunks=chunks, batch=(batch,), context=96, prefill=8, verify=3)
    export(folder, tmp_path / "bundle", options)
    theirs, ours = reference(folder, batch), open_session(tmp_path / "bundle", "mil", batch)
    counts = [13, 4, 9, 1][:batch]
    tokens = np.random.default_rng(5).integers(0, 96, (batch, 13))
    for session in (theirs, ours):
        session.extend(tokens, counts)
        session.rewind([c - min(3, c - 1) for c in counts])
    tokens = tokens[:, :2]
    for _ in range(24):
        expected, got = np.array(theirs.extend(tokens)), ours.extend(tokens)
        assert divergence(expected, got) < 1e-3
        assert all(agrees(got[row, -1], expected[row, -1]) for row in range(batch))
        tokens = expected[:, -1:].argmax(-1)
