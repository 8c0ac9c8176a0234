"""The demo's student on more requests than the demo has time for: over float, and over the twin without a teacher.

The demo's recipe is trained with one seed in float, on the grid that ships, and on three bits (there for nine tenths of
the steps instead of half); the twin without a teacher on the grid that ships. Packed models answer 800 requests of each
held-out set (``--quick``: 20, 20 steps), and differences are paired: their standard error counts only requests that one
answers and the other does not.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from mlxkd.demo import world
from mlxkd.evaluation.answers import answer_all, cut_to_answers
from mlxkd.metric import Metric
from mlxkd.recipe import load_recipe
from mlxkd.runtime import device_name
from mlxkd.training.judging import deployed
from mlxkd.training.run import BASELINE, CROSS_ENTROPY, STUDENT, make_trainer
from mlxkd.training.setup import HELD_OUT, Setup, prepare
from mlxkd.training.terms import terms_of

GRIDS: dict[str, tuple[str, ...]] = {
    "float": ("quantisation.grid=float", "quantisation.learned_ranges=false"),
    "4_bits": (),
    "3_bits": ("quantisation.grid=mlx-affine3-g32", "quantisation.fraction=0.9"),  # fewer bits need longer on the grid
}
QUICK = ("training.steps=20", "training.evaluate_every=20")
REQUESTS, SEED = 800, 777


def measure(quick: bool) -> dict[str, Metric]:
    """``exact_*`` of the four; ``points_4_bits`` and ``points_3_bits`` over float, ``points_over_twin`` of 4 bits."""
    requests, quickly = (20, QUICK) if quick else (REQUESTS, ())
    right = {name: _right(_trained((*given, *quickly)), requests) for name, given in GRIDS.items()}
    right["twin"] = _right(_trained(quickly, BASELINE), requests)
    device, count = device_name(), len(right["float"])
    figures = {
        f"exact_{name}": Metric(statistics.fmean(values), "share", "measured", device, count)
        for name, values in right.items()
    }
    pairs = {"4_bits": ("4_bits", "float"), "3_bits": ("3_bits", "float"), "over_twin": ("4_bits", "twin")}
    for name, (one, other) in pairs.items():
        differences = [100.0 * (a - b) for a, b in zip(right[one], right[other], strict=True)]
        note = f"standard error {statistics.stdev(differences) / math.sqrt(count):.2f}"
        figures[f"points_{name}"] = Metric(
            statistics.fmean(differences), "points", "measured", device, count, note=note
        )
    return figures


def _trained(overrides: tuple[str, ...], name: str = STUDENT) -> Setup:
    setup = prepare(load_recipe("demo", overrides))
    terms = terms_of(setup.recipe.loss if name == STUDENT else CROSS_ENTROPY)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(setup, setup.student, name, terms, Path(folder))
        trainer.run()
        trainer.restore_best()
        trainer.quantised.round_off(setup.student)
    return setup


def _right(setup: Setup, requests: int) -> list[bool]:
    """Whether the packed student answers exactly, by request."""
    model = deployed(setup.student, setup.config).model
    records = [record for split in HELD_OUT for record in world.conversations(split, SEED, requests)]
    cases = [cut_to_answers(record)[0] for record in records]
    options = setup.recipe.evaluation
    answers = answer_all(model, setup.tokenizer, cases, max_tokens=options.max_tokens, rows=options.rows)
    return [answer.score.exact for answer in answers]
