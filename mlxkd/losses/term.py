"""A term of the training loss: which loss, how much of it, at which temperature, from which teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mlxkd import registry
from mlxkd.errors import UserError, unknown
from mlxkd.losses import terms as members


def names() -> tuple[str, ...]:
    """Every loss a recipe can name."""
    return registry.listing(members)


@dataclass(frozen=True)
class Term:
    """One summand of the training loss.

    Args:
        name: a member of ``mlxkd.losses.terms``.
        weight: its factor in the sum; must be positive.
        temperature: T divides both logits; must be positive.
        options: the member's Options, or a mapping of its fields.
        teacher: which targets it reads, when several teachers speak.
        scale_t2: multiply by T squared, so that the size of the gradient does not depend on T (Hinton,
            1503.02531). TRL and mlx-lm do not; switch it off to compare with them.

    Raises:
        UserError: unknown name or option, a value out of range.
    """

    name: str
    weight: float = 1.0
    temperature: float = 1.0
    options: Any = field(default_factory=dict)
    teacher: str = "teacher"
    scale_t2: bool = True

    def __post_init__(self) -> None:
        where = f"loss.{self.name}"
        for key in ("weight", "temperature"):
            value = getattr(self, key)
            if not 0 < value < float("inf"):
                raise UserError(f"{key} must be a positive number, not {value!r}", where=where)
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", _options(self.module, self.options, where))
        elif not isinstance(self.options, self.module.Options):
            raise UserError(f"options of another loss: {type(self.options).__module__}", where=where)

    @property
    def module(self) -> ModuleType:
        """The member that holds the formula."""
        return registry.member(members, self.name, kind="loss")

    @property
    def key(self) -> str:
        """Its name in logs."""
        teacher = "" if self.teacher == "teacher" else f"/{self.teacher}"
        return f"{self.name}{teacher}" + ("" if self.temperature == 1 else f"@{self.temperature:g}")

    @property
    def needs_teacher(self) -> bool:
        """Whether it reads a teacher's distribution."""
        return self.module.NEEDS in ("teacher", "aligned")

    @property
    def factor(self) -> float:
        """T squared, or 1."""
        return self.temperature**2 if self.scale_t2 and self.needs_teacher else 1.0


def _options(module: ModuleType, given: Mapping[str, Any], where: str) -> Any:
    known = [f.name for f in dataclasses.fields(module.Options)]
    for key in given:
        if key not in known:
            raise unknown("option", key, known or ["(none)"], where=where)
    return module.Options(**given)


def checked(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms as a tuple; refuses none at all and two that would share a name in the log."""
    if not terms:
        raise UserError("no loss term: nothing to train on", where="loss", hint=f"known: {', '.join(names())}")
    keys = [term.key for term in terms]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"two terms are called {key!r}; add their weights instead", where="loss")
    return tuple(terms)
