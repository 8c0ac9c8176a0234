"""A bundle on the reference runtime says what MLX says: same greedy tokens, nearly the same distribution."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pairwise
import pytest
from toy_models import on_grid

from ane.convert import families
from ane.convert.check import divergence, reference
from ane.convert.export import export
from ane.convert.options import Options
from ane.runtime import open_session
from mlxkd import compat
from mlxkd.quant.grids import FLOAT, grid, names

STEPS = 200
PROMPT = 9
# One choice of options per family for the long run; the combinations follow below.
CHOICES: dict[str, dict[str, Any]] = {
    "llama": {"head_width": 40},
    "mistral": {"kv": "explicit", "chunks": 2},
    "qwen2": {"profile": "gpu"},
    "qwen3": {"chunks": 3, "positions": "model"},
    "smollm3": {"profile": "gpu", "kv": "explicit", "embedding": "host"},
    "gemma2": {"embedding": "model", "target": "iOS26"},
    "gemma3_text": {"verify": 4},
}


def agrees(got: np.ndarray, expected: np.ndarray, tie: int = 4) -> bool:
    """Same greedy token; or a tie, where the two best lie within ``tie`` float16 steps of each other."""
    ours, theirs = int(got.argmax()), int(expected.argmax())
    return ours == theirs or expected[theirs] - expected[ours] <= tie * np.spacing(np.float16(expected[theirs]))


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
WIDEST = {"hidden_size": 128, "head_dim": 32}  # rows as long as the widest group of a grid
FORMS = [("ane", "float"), ("ane", "ane-int8"), ("ane", "ane-lut4"), ("gpu", "float"), ("gpu", "mlx-affine4-g32")]
# Two layers still hold both kinds of each family's: window and all, with positions and without.
SHALLOW = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "no_rope_layer_interval": 2}
# In full in the slow test; in pairs, and with the rest of the options, in every run.
PRODUCT: dict[str, list[Any]] = {
    "family": list(families.names()),
    "form": FORMS,
    "kv": ["state", "explicit"],
    "chunks": [1, 3],
    "batch": [(1,), (1, 2), (4,)],
}
FACTORS = PRODUCT | {
    "chunks": [1, 2],
    "embedding": ["host", "model"],
    "positions": ["host", "model"],
    "head": ["logits", "argmax"],
    "head_width": [0, 40],
    "verify": [0, 3],
    "rewind": [64, 12],  # 12 makes a ring of gemma3_text's window, 64 keeps the whole context
    "target": ["iOS18", "iOS26"],
}


def named(row: dict[str, Any]) -> str:
    """A row as the id of a test."""
    return "-".join(str(value).replace(" ", "") for value in row.values())


def test_rows_hold_every_pair() -> None:
    """By counting, apart from the generator; seven families times five forms is the least there can be."""
    made = list(pairwise.rows(FACTORS))
    for first, second in itertools.combinations(FACTORS, 2):
        met = {(str(row[first]), str(row[second])) for row in made}
        assert len(met) == len(FACTORS[first]) * len(FACTORS[second])
    assert len(FACTORS["family"]) * len(FORMS) <= len(made) <= 40


@pytest.mark.parametrize("row", list(pairwise.rows(FACTORS)), ids=named)
def test_every_two_options_together_follow_mlx(row: dict[str, Any], toy: Any, tmp_path: Path) -> None:
    follow_rows(row, 6, toy, tmp_path, **SHALLOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [dict(zip(PRODUCT, values, strict=True)) for values in itertools.product(*PRODUCT.values())], ids=named
)
def test_every_combination_follows_mlx(row: dict[str, Any], toy: Any, tmp_path: Path) -> None:
    follow_rows({**row, "verify": 3}, 24, toy, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_grid_follows_mlx_for_two_hundred_tokens(name: str, toy: Any, tmp_path: Path) -> None:
    """Two rows of different lengths and a rewind, then 200 steps; MLX's own grids on the profile that holds them."""
    profile = "gpu" if name != FLOAT and grid(name).packing else "ane"
    row = {"family": "mistral", "form": (profile, name), "batch": (1, 2), "context": 224}
    follow_rows(row, STEPS, toy, tmp_path, **WIDEST)


def follow_rows(row: dict[str, Any], steps: int, toy: Any, scratch: Path, **changes: Any) -> None:
    """Rows of different lengths, a rewind in the middle, then so many greedy tokens of MLX."""
    choices = dict(row)
    profile, weights = choices.pop("form")
    folder = on_grid(toy(choices.pop("family"), **{**WIDE, **changes}), scratch / "source", weights)
    export(folder, scratch / "bundle", Options(profile=profile, prefill=8, **{"context": 96, **choices}))
    batch = max(choices["batch"])
    # A session for each row: mlx-lm's Gemma 2 cannot take a mask per row, and rows must not know of each other.
    theirs, ours = [reference(folder) for _ in range(batch)], open_session(scratch / "bundle", "mil", batch)
    counts = [13, 4, 9, 1][:batch]
    kept = [count - min(3, count - 1) for count in counts]
    tokens = np.random.default_rng(5).integers(0, 96, (batch, 13))
    ours.extend(tokens, counts)
    ours.rewind(kept)
    for session, line, count, length in zip(theirs, tokens, counts, kept, strict=True):
        session.extend(line[None, :count])
        session.rewind([length])
    tokens = tokens[:, :2]
    # MLX rounds scale and bias apart from each other; scale * (code - offset) has the same codes, but a float16 offset
    # holds bias / scale to 2^-12 of itself only: up to 0.2 of a step at 8 bits, and logits that differ by some 0.02.
    tie = 16 if "affine" in weights else 4
    for _ in range(steps):
        expected = np.concatenate([np.array(s.extend(line[None])) for s, line in zip(theirs, tokens, strict=True)])
        got = ours.extend(tokens)
        assert choices.get("head") == "argmax" or divergence(expected, got) < 1e-3
        assert all(agrees(got[i, -1], expected[i, -1], tie) for i in range(batch))
        tokens = expected[:, -1:].argmax(-1)
