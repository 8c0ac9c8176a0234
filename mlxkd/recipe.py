"""The recipe of a run: typed, strict, read from YAML with overrides on top.

An unknown key, a wrong type or an impossible combination is refused with the file, the key and the nearest
valid name. Every value has a default; ``mlxkd train --print-recipe`` shows what a run would use.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field, model_validator

from mlxkd.errors import UserError, unknown
from mlxkd.recipe_sections import (
    Data,
    Evaluation,
    Hidden,
    Loss,
    OnPolicy,
    Optimizer,
    Quantisation,
    Section,
    Student,
    Teacher,
    Training,
)

RECIPES = Path(__file__).with_name("recipes")


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="the run folder's name under --out")
    seed: int = Field(0, ge=0, description="of the shuffles and of fresh weights")
    device: Literal["cpu", "gpu"] | None = Field(None, description="MLX device; None takes MLX's own choice")
    teacher: Teacher = Teacher()
    teachers: dict[str, Teacher] = Field(default_factory=dict, description="further teachers by name, for loss.teacher")
    routes: dict[str, str] = Field(
        default_factory=dict,
        description='beginning of a record\'s source ("file:line") -> the teacher that judges it; "" routes the rest',
    )
    student: Student = Student()
    data: Data
    loss: tuple[Loss, ...] = (Loss(name="forward_kl", weight=1.0), Loss(name="cross_entropy", weight=0.5))
    on_policy: OnPolicy | None = Field(
        None, description="train on text that is written on the way too; None: on data alone"
    )
    hidden: Hidden | None = Field(None, description="match hidden states as well; None leaves it out")
    optimizer: Optimizer = Optimizer()
    quantisation: Quantisation = Quantisation()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        if not any(term.weight > 0 for term in self.loss):
            raise ValueError("loss: every weight is 0, so nothing would be learned")
        self._check_latency()
        self._check_own_text()
        names = [(term.name, term.teacher) for term in self.loss]
        if len(set(names)) != len(names):
            raise ValueError("loss: a term stands twice")
        self._check_teachers()
        if self.student.frozen and self.quantisation.ranges_first:
            raise ValueError("quantisation.ranges_first: afterwards every weight would train, student.frozen included")
        if self.student.lora and self.student.lora.dropout and self.training.checkpoint_layers:
            raise ValueError(
                "student.lora.dropout: checkpoint_layers computes each layer twice, and the two would drop other "
                "units; leave one of them out"
            )
        return self

    @property
    def _own_text(self) -> OnPolicy | None:
        """``on_policy`` where the student is the writer."""
        return self.on_policy if self.on_policy and self.on_policy.writer == "student" else None

    def _check_latency(self) -> None:
        acting = {term.name: term for term in self.loss if term.weight > 0}
        if acting and not acting.keys() - {"expected_length", "rollout_length"}:
            raise ValueError("loss: shortness alone teaches to stop; add a term that teaches the answers")
        if rollout := acting.get("rollout_length"):
            if self._own_text is None:
                raise ValueError("rollout_length: it weighs what the student writes; set on_policy, writer: student")
            if self._own_text.temperature != rollout.temperature:
                raise ValueError(
                    "rollout_length: its temperature must be that of on_policy, where its samples come from"
                )

    def _check_own_text(self) -> None:
        acting = {term.name for term in self.loss if term.weight > 0}
        if "contrastive" in acting and not self._own_text:
            raise ValueError("contrastive: it sets the student's text against the data; set on_policy, writer: student")
        if self.on_policy and self.on_policy.corrected and not self._own_text:
            raise ValueError("on_policy.corrected: it corrects what the student writes, and the writer is the teacher")
        silent = {"cross_entropy", "early_call", "expected_length"}  # they need an answer of the data
        if self._own_text and not self.hidden and acting <= silent:
            raise ValueError(
                "on_policy: no loss says anything about what the student writes; add a teacher's loss or rollout_length"
            )

    def _check_teachers(self) -> None:
        known = ("teacher", *self.teachers)
        if "teacher" in self.teachers:
            raise ValueError('teachers: "teacher" is the name of the first one; choose another')
        named = [*(term.teacher for term in self.loss), *self.routes.values()]
        if strange := next((name for name in named if name not in known), None):
            raise ValueError(f"no teacher is called {strange!r}; there are {', '.join(known)}")
        live = not any(teacher.cache for teacher in (self.teacher, *self.teachers.values()))
        if self.on_policy and not live:
            raise ValueError("on_policy: a cache knows nothing of what is written on the way; leave teacher.cache out")
        if self.hidden and self.teacher.cache:
            raise ValueError("hidden: a cache holds no hidden states; leave teacher.cache out")
        if self.hidden and self.teachers:
            raise ValueError("hidden: states are matched with one teacher; leave teachers out")

    def identity(self) -> str:
        """A hash of everything that shapes the result."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe, readable by ``load_recipe``."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with mlxkd."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def load_recipe(source: str | Path = "demo", overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a shipped name or a YAML file.
        overrides: ``key.sub=value`` texts, values in YAML.

    Raises:
        UserError: no such recipe, broken YAML, unknown keys, wrong types, impossible combinations.
    """
    path = RECIPES / f"{source}.yaml" if str(source) in shipped() else Path(source)
    if not path.is_file():
        raise unknown("recipe", str(source), shipped(), where="--recipe")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"this is not YAML: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of keys", where=str(path))
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Check a mapping against the recipe's types; every fault is reported at once."""
    try:
        return Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
        raise UserError("; ".join(faults), where=where, hint="`mlxkd train --print-recipe` shows all keys") from error


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not of the form key=value", where="--set")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {key} is not YAML: {error}", where="--set") from error
    *parents, last = key.split(".")
    node: Any = raw
    for name in parents:
        node = node[_index(node, name, key)] if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise UserError(f"{name} in {key} is a value, not a section", where="--set")
    node[_index(node, last, key) if isinstance(node, list) else last] = parsed


def _index(entries: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(entries):
        raise UserError(f"{key}: the list has entries 0 to {len(entries) - 1}, not {name}", where="--set")
    return int(name)


def _fault(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _fields_at(fault["loc"][:-1]), n=1)
        return f"unknown key {place}" + (f", did you mean {near[0]}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _fields_at(place: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for name in place:
        if isinstance(name, int):
            continue
        annotation = model.model_fields[name].annotation
        choices = [annotation, *get_args(annotation)]
        model = next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), model)
    return list(model.model_fields)
