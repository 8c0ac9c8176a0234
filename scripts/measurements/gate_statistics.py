"""False alarms and detections of the speed gates, coverage of their intervals: 1,000 simulated builds each.

Against the truth the simulation knows: no change, and 10 % slower. There is no peer; `--quick` simulates 100 builds.
"""

from __future__ import annotations

from bench.gates import thresholds
from bench.simulation import coverage, rate
from bench.statistics import Statistic
from mlxkd.metric import Metric

COVERED: tuple[tuple[Statistic, int, float], ...] = (("p50", 20, 0.05), ("es90", 100, 0.05), ("p95", 100, 0.0))
"""Statistic, requests per round, share of slow requests."""


def measure(quick: bool) -> dict[str, Metric]:
    """``false_alarm_rate``: unchanged builds that fail; ``detection_rate``: 10 % slower builds that fail.

    ``coverage_*``: sessions whose one-sided 95 % bound holds the true change.
    """
    builds, limits = (100 if quick else 1000), thresholds("default")
    note = f"{builds} simulated builds, 10 to 40 rounds of 100 requests, four gates"
    found = {
        "false_alarm_rate": Metric(rate("fail", builds, 0.0, limits), "share", "simulated", n=builds, note=note),
        "detection_rate": Metric(rate("fail", builds, 0.10, limits), "share", "simulated", n=builds, note=note),
    }
    for name, requests, slow in COVERED:
        shares = coverage(name, builds, requests=requests, slow=slow)
        about = f"stated 95 %; 10 rounds of {requests} requests, {slow:.0%} slow"
        for side, share in shares.items():
            found[f"coverage_{name}_{side}"] = Metric(share, "share", "simulated", n=builds, note=about)
    return found
