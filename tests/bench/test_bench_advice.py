"""Agreement against closed forms, and advice that follows from the figures and names its limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from bench import agreement, recommend
from bench.hardware import Conditions, Hardware
from bench.report import document
from bench.results import Report, Round, Target, Workload

SAME = {"identical_answers": 1.0, "same_preference": 1.0, "kl_mean": 1e-5, "kl_max": 1e-4}


def test_kl_and_divergence_against_scipy() -> None:
    rng = np.random.default_rng(0)
    first = [rng.normal(size=7) for _ in range(5)]
    second = [v.copy() for v in first]
    second[3] = np.roll(first[3], 1)
    found = agreement.compare(first, second)
    p, q = softmax(first[3]), softmax(second[3])
    assert found.kl[3] == pytest.approx(float((p * np.log(p / q)).sum())) and found.kl[0] == pytest.approx(0)
    assert (found.diverges, found.same, found.positions) == (3, 4, 5)
    top = np.sort(first[3])
    assert found.margin == pytest.approx(top[-1] - top[-2])
    whole = agreement.compare(first, first)
    assert whole.identical and agreement.summary([whole, found])["identical_answers"] == 0.5


def report(bundle_factor: dict[str, float], backend: str = "coreml") -> Report:
    rng = np.random.default_rng(1)
    rounds = []
    for index in range(8):
        for name, kind in (("mlx", 1.0), ("bundle", None)):
            samples = {
                series: list(10 * (kind or factor) * rng.lognormal(0, 0.01, 20))
                for series, factor in bundle_factor.items()
            }
            rounds.append(Round(target=name, index=index, samples=samples, device="d"))
    targets = [Target(name="mlx", kind="mlx", location="m", backend="mlx gpu"),
               Target(name="bundle", kind="bundle", location="b", backend=backend)]  # fmt: skip
    mac, asked = Hardware(chip="Apple M4", cores=10, system="x"), Workload(name="interactive", hash="h")
    return Report(kind="compare", created="2026-01-01", hardware=mac, workload=asked, targets=targets, rounds=rounds)


@pytest.mark.parametrize(
    ("factors", "choice", "sentence"),
    [
        ({"tpot_ms": 3.0, "ttft_ms": 2.0}, "mlx", "Ship the MLX model: it wins wherever they differ."),
        ({"tpot_ms": 0.5, "ttft_ms": 0.7}, "bundle", "Ship the bundle: it wins wherever they differ."),
        ({"tpot_ms": 3.0, "joules_per_token": 0.3}, "mlx", "where battery or a free GPU matters"),
        ({"tpot_ms": 1.0}, None, "no difference beyond the noise"),
    ],
)
def test_advice_follows_the_figures(factors: dict[str, float], choice: str | None, sentence: str) -> None:
    advice = recommend.advise(report(factors), SAME)
    assert advice.choice == choice and sentence in advice.sentence
    assert any("Apple M4 only" in limit for limit in advice.limits)


def test_no_speed_advice_from_the_reference_runtime() -> None:
    advice = recommend.advise(report({"tpot_ms": 0.5}, backend="mil"), SAME)
    assert advice.choice is None and "reference runtime" in advice.sentence


def test_a_bundle_that_says_something_else_is_not_shipped() -> None:
    advice = recommend.advise(report({"tpot_ms": 0.5}), SAME | {"kl_mean": 0.2})
    assert advice.choice == "mlx" and "does not say the same" in advice.sentence
    lossy = report({"tpot_ms": 0.5})
    lossy.quality = {"mlx": {"call_exact": [1.0] * 10}, "bundle": {"call_exact": [1.0] * 8 + [0.0] * 2}}
    advice = recommend.advise(lossy, SAME)
    assert advice.choice == "mlx" and "the bundle loses 20.0 points of exact calls" in advice.reasons


def test_what_was_not_nominal_is_said_once_with_how_often() -> None:
    """Loads differ from round to round; a stored advice is not repeated below the one that is shown."""
    found = report({"tpot_ms": 3.0})
    for number in (0, 3):
        load = Conditions(problems=[f"the machine is busy (load {number + 1}.2 per core)"])
        found.rounds[number] = found.rounds[number].model_copy(update={"conditions": load})
    assert found.problems() == ["the machine is busy (in 2 of 16 runs)"]
    assert found.problems("mlx") == ["the machine is busy (in 1 of 8 runs)"]
    advice = recommend.advise(found, SAME)
    found.notes += advice.notes
    shown, stored = document(found, advice=advice).markdown(), document(found).markdown()
    assert shown.count(advice.sentence) == stored.count(advice.sentence) == 1
