"""Apple chip generations, as far as the rules tell them apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxkd.errors import unknown

# Generations in order of their Neural Engine: the A and the M chip of one row share it.
ORDER = {"a14": 1, "m1": 1, "a15": 2, "m2": 2, "a16": 3, "a17": 3, "m3": 2, "m4": 4, "a18": 4, "a19": 5, "m5": 5}


@dataclass(frozen=True)
class Chip:
    """One generation.

    Args:
        name: "m1" ... "m5", "a14" ... "a19".
        max_width: largest width or height of a tensor: 16384 on A14, A15, M1 to M3; 65536 from A16 and M4
            (ane-guide, appendix a, lines 45 to 48; confirmed on an M4 and an M3 Ultra by others).
    """

    name: str

    @property
    def order(self) -> int:
        """Generation number of the Neural Engine."""
        return ORDER[self.name]

    @property
    def max_width(self) -> int:
        """Largest width or height."""
        return 65536 if self.order >= 3 else 16384


def chip(name: str) -> Chip:
    """The generation of "m4", "M4 Max" or "Apple M4 Pro"; raises UserError with the nearest known name."""
    found = re.search(r"\b([am]\d+)\b", name.lower())
    if found is None or found[1] not in ORDER:
        raise unknown("chip", name, ORDER)
    return Chip(found[1])
