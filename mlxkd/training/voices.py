"""The recipe's teachers as objects that answer about batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.step import speakers
from mlxkd.recipe_sections import Teacher
from mlxkd.runtime import row_streams
from mlxkd.students.split import Split
from mlxkd.teachers.cached import CachedTeacher
from mlxkd.teachers.crossing import CrossTeacher
from mlxkd.teachers.identity import teacher_identity, tokenizer_hash
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.routed import RoutedTeachers
from mlxkd.training.setup import Setup, teacher_folder
from mlxkd.training.terms import terms_of

_TEACH = "write one with `mlxkd teach`, then set cache beside form"
Voice = LocalTeacher | CachedTeacher | CrossTeacher


def teachers(setup: Setup, examples: Sequence[Example]) -> Voice | RoutedTeachers:
    """The teacher, or all of them with their routes. Each is live or what it said once.

    Args:
        setup: of the recipe.
        examples: those that batches refer to by row; the list may grow.

    Raises:
        UserError: a cache of something else, a text that a teacher with another tokenizer cannot read.
    """
    recipe = setup.recipe
    first = _voice(setup, "teacher", setup.teacher, recipe.teacher, examples)
    if not recipe.teachers:
        return first
    others = {
        name: _voice(setup, name, setup.teachers[name], wanted, examples) for name, wanted in recipe.teachers.items()
    }
    return RoutedTeachers({"teacher": first, **others}, examples, recipe.routes)


def _voice(setup: Setup, name: str, model: nn.Module, wanted: Teacher, examples: Sequence[Example]) -> Voice:
    if name in setup.foreign:
        mine = (term for term in terms_of(setup.recipe.loss) if term.needs_teacher and term.teacher == name)
        temperature = next(mine).temperature
        rows = Split(setup.student, verify=False).head.rows
        return CrossTeacher(model, setup.foreign[name], setup.tokenizer, rows, examples, temperature)
    if wanted.cache is None:
        return LocalTeacher(model, streams=row_streams())
    names = {"tokenizer": tokenizer_hash(setup.tokenizer), "teacher": teacher_identity(teacher_folder(wanted.model))}
    return CachedTeacher(Path(wanted.cache), examples, form=wanted.form, **names)


def check_voices(setup: Setup) -> None:
    """Find out what student and teachers cannot do, before a run writes anything.

    Raises:
        UserError: a model that cannot be split, a layer to match that it has not, data without a route, a text that is
            missing in a cache or cannot be read by a teacher with another tokenizer, a term or temperature that a cache
            does not serve.
    """
    matched = setup.recipe.hidden.layers if setup.recipe.hidden else ()
    for model, layers in ((setup.student, [a for a, _ in matched]), (setup.teacher, [b for _, b in matched])):
        Split(model).states(mx.array([[0]]), layers)
    all_of_them = {"teacher": setup.teacher, **setup.teachers}
    RoutedTeachers(all_of_them, setup.batches.examples, setup.recipe.routes).check()
    named = {"teacher": (setup.teacher, setup.recipe.teacher)}
    named |= {name: (setup.teachers[name], wanted) for name, wanted in setup.recipe.teachers.items()}
    for name, (model, wanted) in named.items():
        if wanted.cache is None and wanted.form != "bucket":
            where = "teacher.form" if name == "teacher" else f"teachers.{name}.form"
            raise UserError(f"{wanted.form} is the form of a cache, and no cache is named", where=where, hint=_TEACH)
        mine = [term for term in terms_of(setup.recipe.loss) if term.needs_teacher and term.teacher == name]
        if not mine or (wanted.cache is None and name not in setup.foreign):
            continue
        voice = _voice(setup, name, model, wanted, setup.batches.examples)
        if isinstance(voice, CachedTeacher | CrossTeacher):
            voice.check()
        if isinstance(voice, CachedTeacher):
            batch = setup.batches.batch(0)
            speakers({name: voice.targets(batch)}, mine, len(batch.supervised))
