"""A quick version of the demo recipe."""

from __future__ import annotations

# Overrides of the demo recipe that make a whole run last seconds.
QUICK = {
    "loss": "[{name: forward_kl, weight: 1.0}, {name: cross_entropy, weight: 0.5}]",
    "data.demo": "{train: 40, valid: 8}",
    "data.shapes": "[[4, 128], [4, 336]]",
    "student.layers": "[0, 2]",
    "student.mlp_width": "32",
    "student.frozen": "[]",
    "hidden": "{layers: [[0, 0], [-1, -1]], kind: mse}",
    "training.steps": "8",
    "training.evaluate_every": "4",
    "training.evaluate_batches": "1",
    "training.save_every": "2",
    "quantisation.fraction": "0.5",
    "quantisation.learned_ranges": "true",
    "quantisation.self_teacher": "0.3",
    "quantisation.stability": "{probe: [2, 16]}",
    "evaluation.tool_calls": "2",
    "evaluation.batches": "1",
    "evaluation.max_tokens": "4",
    "evaluation.baseline": "false",
}


def quick(**changes: str) -> list[str]:
    """``--set`` arguments of a quick run; keyword ``a__b`` changes key ``a.b``."""
    values = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
