"""The demo's student at 4 and at 3 bits against its float twin, on the same held-out requests.

The demo's recipe is trained three times with one seed: in float, on the grid that ships, and on three bits; no twin
without a teacher. Packed students answer 800 requests of each held-out set (``--quick``: 20, after 20 steps), and
differences are paired: their standard error counts only requests that one answers and the other does not.
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
from mlxkd.training.run import STUDENT, make_trainer
from mlxkd.training.setup import HELD_OUT, Setup, prepare
from mlxkd.training.terms import terms_of

GRIDS: dict[str, tuple[str, ...]] = {
    "float": ("quantisation.grid=float", "quantisation.learned_ranges=false"),
    "4_bits": (),
    "3_bits": ("quantisation.grid=mlx-affine3-g32",),
}
QUICK = ("training.steps=20", "training.evaluate_every=20")
REQUESTS, SEED = 800, 777


def measure(quick: bool) -> dict[str, Metric]:
    """``exact_*`` of the three, and ``points_4_bits`` and ``points_3_bits`` over the float twin."""
    requests = 20 if quick else REQUESTS
    right = {name: _right(_trained((*given, *(QUICK if quick else ()))), requests) for name, given in GRIDS.items()}
    device, count = device_name(), len(right["float"])
    figures = {
        f"exact_{name}": Metric(statistics.fmean(values), "share", "measured", device, count)
        for name, values in right.items()
    }
    for name in ("4_bits", "3_bits"):
        differences = [100.0 * (a - b) for a, b in zip(right[name], right["float"], strict=True)]
        note = f"standard error {statistics.stdev(differences) / math.sqrt(count):.2f}"
        figures[f"points_{name}"] = Metric(
            statistics.fmean(differences), "points", "measured", device, count, note=note
        )
    return figures


def _trained(overrides: tuple[str, ...]) -> Setup:
    setup = prepare(load_recipe("demo", overrides))
    with TemporaryDirectory() as folder:
        trainer = make_trainer(setup, setup.student, STUDENT, terms_of(setup.recipe.loss), Path(folder))
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
