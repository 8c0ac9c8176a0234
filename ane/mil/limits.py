"""How much a package may ask of the machine before it is refused."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mlxkd import runtime
from mlxkd.errors import UserError

# Where the system does not say how much memory it has.
ASSUMED_MEMORY = 8 << 30


@dataclass(frozen=True)
class Limits:
    """Bounds on reading and running a package.

    Args:
        memory: bytes that one tensor, and all decoded constants together, may take; None: half of the machine's.
        spec_bytes: largest model.mlmodel that is parsed.
        nodes: operations in one package, nested ones included.
        loop_steps: iterations of one ``while_loop``.
        seconds: wall clock of one prediction; None: no bound.
    """

    memory: int | None = None
    spec_bytes: int = 1 << 31
    nodes: int = 1_000_000
    loop_steps: int = 1_000_000
    seconds: float | None = None

    @functools.cached_property
    def bytes(self) -> int:
        """The memory bound in bytes."""
        return self.memory if self.memory is not None else (runtime.total_memory() or ASSUMED_MEMORY) // 2

    def check(self, elements: int, what: str, *, where: str | None = None, itemsize: int = 4) -> None:
        """Raise UserError when ``elements`` of ``itemsize`` bytes are more than one tensor may take."""
        if elements * itemsize > self.bytes:
            raise UserError(
                f"{what} would take {human(elements * itemsize)}, more than the bound of {human(self.bytes)}",
                where=where,
                hint="raise Limits.memory if the package is trusted",
            )

    def check_elements(self, elements: int) -> None:
        """``check`` for a result whose size an operation has just worked out."""
        self.check(int(elements), f"a result of {int(elements)} elements")


def human(size: float) -> str:
    """A byte count for people: 1536 -> "1.5 KiB"."""
    exponent = min(int(math.log(size, 1024)), 6) if size >= 1 else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")[exponent]
    return f"{size / 1024**exponent:.{1 if exponent else 0}f} {unit}"
