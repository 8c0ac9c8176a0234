"""Which path to ship, with the reasons and with what the figures cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench import statistics
from bench.results import Report
from mlxkd.report.sections import Tone
from mlxkd.report.values import show_number

SMALL_KL = 0.01  # nats per token: below the loss of 8-bit weights on the models of the measurements
LOST_CALLS = 0.02


@dataclass(frozen=True)
class Advice:
    """A plain sentence, its reasons, and the limits of what was seen."""

    choice: str | None
    sentence: str
    reasons: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def tone(self) -> Tone:
        """How to show it."""
        return "unsure" if self.choice is None else "good"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a stored report keeps of it."""
        return (f"recommendation: {self.sentence}", *(f"limit: {limit}" for limit in self.limits))


def advise(report: Report, agreement: Mapping[str, float]) -> Advice:
    """Advice for a comparison of an MLX target with a bundle.

    Args:
        report: of kind compare, targets "mlx" and "bundle".
        agreement: from ``bench.agreement.summary``.
    """
    reasons, limits = [_sameness(agreement)], _limits(report)
    worse = _lost_calls(report)
    if worse is not None:
        reasons.append(worse)
    if worse is not None or agreement["kl_mean"] > SMALL_KL:
        return Advice("mlx", "Ship the MLX model: the bundle does not say the same.", tuple(reasons), tuple(limits))
    if report.target("bundle").backend != "coreml":
        sentence = (
            "Cannot tell from here: this bundle ran on the reference runtime, which says nothing of Core ML's speed."
        )
        limits.append("run the same command on a Mac to decide by speed and energy")
        return Advice(None, sentence, tuple(reasons), tuple(limits))
    return _by_figures(report, reasons, limits)


def _sameness(agreement: Mapping[str, float]) -> str:
    identical, kl = 100 * agreement["identical_answers"], agreement["kl_mean"]
    return f"{identical:.0f} % of the greedy answers are identical, {show_number(kl)} nats/token apart on average"


def _lost_calls(report: Report) -> str | None:
    ours, theirs = (report.quality.get(n, {}).get("call_exact") for n in ("mlx", "bundle"))
    if not ours or not theirs:
        return None
    lost = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return f"the bundle loses {100 * lost:.1f} points of exact calls" if lost > LOST_CALLS else None


def _limits(report: Report) -> list[str]:
    rounds = len(report.rounds) // max(len(report.targets), 1)
    found = [f"{rounds} round{'s' * (rounds != 1)} of {report.workload.name} on {report.hardware.chip} only"]
    if not any(r.samples.get("joules_per_token") for r in report.rounds):
        found.append("no energy: not available here: needs macOS and macmon")
    problems = report.problems()
    if problems:
        found.append(f"conditions were not nominal: {', '.join(problems)}")
    return found


def _by_figures(report: Report, reasons: list[str], limits: list[str]) -> Advice:
    won: dict[str, str] = {}
    for series, words in (("joules_per_token", "energy per token"), ("tpot_ms", "time per token"), ("ttft_ms", "TTFT")):
        ours, theirs = report.series("mlx", series), report.series("bundle", series)
        if len(ours) < 3 or len(ours) != len(theirs):
            continue
        estimate = statistics.log_ratio(ours, theirs, "p50")
        low, high = (math.exp(estimate.bound(0.95, side)) for side in ("lower", "upper"))
        reasons.append(f"{words}: bundle over MLX {math.exp(estimate.value):.2f} ({low:.2f} to {high:.2f})")
        if high < 1 or low > 1:
            won[series] = "bundle" if high < 1 else "mlx"
    if not won:
        return Advice(None, "Cannot tell: no difference beyond the noise.", tuple(reasons), tuple(limits))
    if len(set(won.values())) == 1:
        choice = next(iter(won.values()))
        name = {"mlx": "the MLX model", "bundle": "the bundle"}[choice]
        return Advice(choice, f"Ship {name}: it wins wherever they differ.", tuple(reasons), tuple(limits))
    if won.get("joules_per_token") == "bundle":
        sentence = "Ship the bundle where battery or a free GPU matters, the MLX model where speed does."
    else:
        sentence = "Ship the MLX model unless the first token matters more than the rest."
    return Advice("mlx", sentence, tuple(reasons), tuple(limits))
