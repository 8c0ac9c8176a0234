"""False alarms and detections of the speed gates on 1,000 simulated builds each (noise: bench.simulation).

Against the truth the simulation knows: no change, and 10 % slower. There is no peer; `--quick` simulates 100 builds.
"""

from __future__ import annotations

from bench.gates import thresholds
from bench.simulation import rate
from mlxkd.metric import Metric


def measure(quick: bool) -> dict[str, Metric]:
    """``false_alarm_rate``: unchanged builds that fail; ``detection_rate``: 10 % slower builds that fail."""
    builds, limits = (100 if quick else 1000), thresholds("default")
    note = f"{builds} simulated builds, 10 to 40 rounds of 100 requests, four gates"
    return {
        "false_alarm_rate": Metric(rate("fail", builds, 0.0, limits), "share", "simulated", n=builds, note=note),
        "detection_rate": Metric(rate("fail", builds, 0.10, limits), "share", "simulated", n=builds, note=note),
    }
