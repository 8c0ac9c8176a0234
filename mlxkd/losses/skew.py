"""What the two skewed divergences share."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkd.errors import UserError


@dataclass(frozen=True)
class SkewOptions:
    """alpha: share of the distribution's own kind in the mix, 0 (the plain KL) to below 1; 0.1 is DistiLLM's."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha must lie between 0 and 1 (1 excluded), not {self.alpha}", where="loss.skew")
