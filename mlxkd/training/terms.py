"""The recipe's loss as terms, and which of its teachers they read through bytes."""

from __future__ import annotations

from collections.abc import Sequence

from mlxkd.errors import UserError
from mlxkd.losses.term import Term
from mlxkd.recipe import Recipe
from mlxkd.recipe_sections import Loss


def terms_of(losses: Sequence[Loss]) -> list[Term]:
    return [
        Term(loss.name, loss.weight, loss.temperature, loss.options, loss.teacher) for loss in losses if loss.weight > 0
    ]


def crossing(recipe: Recipe) -> frozenset[str]:
    """Names of the teachers that are read through bytes, because ``gold`` or ``uld`` compares with them.

    Raises:
        UserError: an unknown loss, or something else in the recipe that needs such a teacher's own token ids.
    """
    terms = terms_of(recipe.loss)
    found = {term.teacher: term.name for term in terms if term.module.NEEDS == "aligned"}
    for teacher, loss in found.items():
        _check_terms(teacher, loss, terms)
        _check_use(teacher, loss, recipe)
    return frozenset(found)


def _check_terms(teacher: str, loss: str, terms: Sequence[Term]) -> None:
    mine = [term for term in terms if term.needs_teacher and term.teacher == teacher]
    if plain := [term.name for term in mine if term.module.NEEDS != "aligned"]:
        raise UserError(
            f"{plain[0]} compares token by token and {loss} by groups of bytes, with one teacher {teacher!r}",
            where="loss",
            hint="name the teacher a second time under teachers, or keep one of the two",
        )
    if len(temperatures := sorted({term.temperature for term in mine})) > 1:
        raise UserError(
            f"one teacher's groups have one temperature, not {' and '.join(f'{t:g}' for t in temperatures)}",
            where="loss",
            hint=f"give every gold and uld term against {teacher!r} the same",
        )


def _check_use(teacher: str, loss: str, recipe: Recipe) -> None:
    first = teacher == "teacher"
    wanted, where = (recipe.teacher, "teacher") if first else (recipe.teachers[teacher], f"teachers.{teacher}")
    faults = [
        (wanted.cache, f"{where}.cache", "a cache holds token ids, and %s reads a live teacher through bytes"),
        (first and recipe.hidden, "hidden", "states are matched token by token, and %s is for another tokenizer"),
        (
            first and recipe.on_policy and recipe.on_policy.corrected,
            "on_policy.corrected",
            "a teacher that %s reads through bytes cannot correct the student's tokens",
        ),
        (
            first and recipe.on_policy and recipe.on_policy.writer == "teacher",
            "on_policy.writer",
            "a teacher that %s reads through bytes cannot write the student's tokens",
        ),
        (
            first and recipe.student.start == "prune",
            "student.start",
            "a pruned student has its teacher's tokenizer, and %s is for another one",
        ),
    ]
    for wrong, key, reason in faults:
        if wrong:
            raise UserError(reason % loss, where=key, hint="leave it out, or choose a loss like forward_kl")
