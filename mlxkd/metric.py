"""A figure that carries how it was obtained. A number without a method cannot be constructed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

Method = Literal["measured", "planned", "predicted", "simulated"]


@dataclass(frozen=True)
class Metric:
    """One figure.

    Args:
        value: the figure, or None when it is missing (never a made-up stand-in).
        unit: "s", "ms", "tokens", "tokens/s", "nats/token", "share", "bytes", ...
        method: measured (on ``device``), planned (Core ML compute plan), predicted (our rules) or simulated.
        device: the hardware the figure belongs to; required when measured.
        n: observations behind the figure.
        p50, p90, p95: percentiles of the observations in ``unit``; ``inf`` when they fall on a censored one.
        censored: observations that never happened (no valid call, say): counted, never dropped.
        note: what a reader must know, in a few words; the reason when ``value`` is None.

    Raises:
        ValueError: unknown method, measured without a device, or missing without a reason.
    """

    value: float | None
    unit: str
    method: Method
    device: str | None = None
    n: int | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    censored: int = 0
    note: str | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r} is not one of {get_args(Method)}")
        if self.method == "measured" and not self.device:
            raise ValueError("a measured figure must name its device")
        if self.value is None and not self.note:
            raise ValueError("a missing figure must say why in its note")

    def to_json(self) -> dict[str, Any]:
        """A JSON object without empty fields; infinities become the string "inf"."""
        fields = {k: v for k, v in asdict(self).items() if v is not None and not (k == "censored" and not v)}
        fields.setdefault("value", None)
        return {k: ("inf" if isinstance(v, float) and np.isinf(v) else v) for k, v in fields.items()}


def from_samples(
    samples: Sequence[float],
    unit: str,
    *,
    method: Method,
    device: str | None,
    censored: int = 0,
    note: str | None = None,
) -> Metric:
    """Summarise observations; ``value`` is the median. Censored ones sit at infinity in the quantiles."""
    everything = np.array([*samples, *([np.inf] * censored)], dtype=np.float64)
    if everything.size == 0:
        return Metric(None, unit, method, device, n=0, note=note or "no observations")
    # "inverted_cdf" picks an observation, so a censored one shows as infinity and never as a NaN average.
    p50, p90, p95 = (float(np.quantile(everything, q, method="inverted_cdf")) for q in (0.5, 0.9, 0.95))
    return Metric(p50, unit, method, device, int(everything.size), p50, p90, p95, censored, note)
