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
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlxkd.errors import UserError, unknown

RECIPES = Path(__file__).with_name("recipes")


class Section(BaseModel):
    """A group of keys; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(Section):
    """Who is imitated."""

    model: str = Field("demo", description='model folder, Hugging Face repository, or "demo" for the embedded teacher')
    cache: str | None = Field(None, description="store that `mlxkd teach` wrote: train from it instead of live")


class Student(Section):
    """Where the student comes from."""

    start: Literal["folder", "config", "prune"] = Field(
        "prune", description='"folder": an existing model; "config": fresh weights; "prune": parts of the teacher'
    )
    model: str | None = Field(None, description='model folder or config.json for "folder" and "config"')
    layers: tuple[int, ...] | None = Field(None, description="teacher layers to keep when pruning; None keeps all")
    depth: int | None = Field(None, description="how many layers to keep, those of greatest block influence")
    mlp_width: int | None = Field(None, description="MLP channels to keep when pruning")
    mlp_channels: Literal["importance", "leading"] = Field(
        "importance",
        description='which ones: those that matter most on the data, or "leading": the first, for nested teachers',
    )
    kv_heads: int | None = Field(None, description="KV heads to keep with their query heads, the most active ones")

    @model_validator(mode="after")
    def _source(self) -> Student:
        if self.start == "prune" and self.model:
            raise ValueError("start: prune takes its weights from the teacher; leave model out")
        if self.start != "prune" and not self.model:
            raise ValueError(f"start: {self.start} needs model")
        if self.start != "prune" and (self.layers or self.depth or self.mlp_width or self.kv_heads):
            raise ValueError("layers, depth, mlp_width and kv_heads belong to start: prune")
        if self.layers and self.depth:
            raise ValueError("layers names the layers and depth counts them; give one of the two")
        return self


class DemoData(Section):
    """Conversations made on the spot by the embedded world."""

    train: int = Field(6000, gt=0, description="training conversations")
    valid: int = Field(200, gt=0, description="validation conversations, of unseen templates, values and tools")


class Data(Section):
    """What is read, and in which shapes."""

    demo: DemoData | None = Field(None, description="use the embedded world instead of files")
    train: str | None = Field(None, description="JSONL, text file or folder in mlx-lm's formats")
    valid: str | None = Field(None, description="validation file; by default the last part of train")
    valid_share: float = Field(0.1, gt=0, lt=1, description="share of train held back when valid is absent")
    limit: int | None = Field(None, gt=0, description="read at most this many records")
    shapes: tuple[tuple[int, int], ...] = Field(
        ((8, 512),), description="(rows, positions) of the batches; each compiles once, longer ones cost memory"
    )
    mix: tuple[float, ...] | None = Field(None, description="share of the batches each shape gets")
    too_long: Literal["truncate", "skip"] = Field("truncate", description="conversations beyond the longest shape")
    turns: Literal["all", "last"] = Field("all", description="assistant turns that carry loss")
    direct_calls: float = Field(0.0, ge=0, le=1, description="share of records whose calls lose the text before them")
    weights: dict[str, float] = Field(
        default_factory=dict, description="loss factors by kind of span: name, value, evidence, preamble, ..."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if bool(self.demo) == bool(self.train):
            raise ValueError("give exactly one of demo and train")
        return self


class Loss(Section):
    """One term of the loss; terms add up by weight."""

    name: str = Field(description="a module of mlxkd.losses, such as forward_kl or cross_entropy")
    weight: float = Field(1.0, ge=0, description="factor of this term")
    temperature: float = Field(1.0, gt=0, description="softens both distributions; the loss is scaled by its square")
    options: dict[str, Any] = Field(default_factory=dict, description="what this term needs beyond that")
    teacher: str = Field("teacher", description="whose targets it reads: the teacher, or a name under teachers")


class OnPolicy(Section):
    """Train on what the student writes itself (GKD), corrected by the teacher at first (SKD)."""

    share: float = Field(0.5, gt=0, le=1, description="share of the batches that the student writes")
    max_tokens: int = Field(64, gt=0, description="longest answer it writes")
    prompt: int = Field(1, gt=0, description="tokens of a plain text that are given before the student goes on")
    temperature: float = Field(1.0, ge=0, description="of its sampling")
    corrected: float = Field(0.0, ge=0, le=1, description="share of the run, at its start, with corrected proposals")
    top: int = Field(25, gt=0, description="a proposal outside the teacher's likeliest so many is replaced")
    replay: float = Field(0.0, ge=0, le=1, description="share of the student's batches drawn from recent ones")
    capacity: int = Field(512, gt=0, description="answers kept for replay")
    staleness: int = Field(50, gt=0, description="batches after which an answer is forgotten")


class Hidden(Section):
    """Match hidden states of a live teacher through learned projectors."""

    layers: tuple[tuple[int, int], ...] = Field(
        description="(student layer, teacher layer) pairs; -1 is the state that enters the head"
    )
    kind: Literal["cosine", "mse"] = Field("cosine", description="1 - cos, or the mean squared difference")
    weight: float = Field(1.0, gt=0, description="factor in the loss")
    positions: Literal["supervised", "visible"] = Field(
        "supervised", description="where labels carry loss, or everywhere such a position can attend to"
    )


class Optimizer(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a linearly rising rate")
    final: float = Field(0.0, ge=0, le=1, description="rate at the end of the cosine, relative to the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the two moments")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices")
    clip: float = Field(1.0, gt=0, description="largest gradient norm; larger ones are scaled down")


class StabilityLimit(Section):
    """A threshold that acts at a validation in the quantised phase."""

    measure: str = Field(description="min_cosine, max_relative_error, max_clipped, flips_per_step, non_finite, ...")
    value: float = Field(description="the limit")
    action: Literal["lower_rate", "roll_back", "stop"] = Field(description="what happens past it")


class Stability(Section):
    """Watch the quantised phase: hidden states of the deployed student against those of the float one before it."""

    probe: tuple[int, int] = Field((4, 64), description="(rows, positions) of the probe, from the validation data")
    limits: tuple[StabilityLimit, ...] = Field(
        (
            StabilityLimit(measure="non_finite", value=0, action="roll_back"),
            StabilityLimit(measure="min_cosine", value=0.3, action="roll_back"),
            StabilityLimit(measure="max_clipped", value=0.5, action="lower_rate"),
        ),
        description="thresholds that act",
    )
    factor: float = Field(0.5, gt=0, lt=1, description="how much an intervention lowers the rate, for good")
    patience: int = Field(3, ge=0, description="interventions before the run stops")


class Quantisation(Section):
    """The grid that ships, and when training starts to feel it."""

    grid: str = Field("mlx-affine4-g64", description='what every eligible layer ships on; "float" for none')
    targets: tuple[str, ...] = Field((), description="several grids for one master, the first as grid; see order")
    order: Literal["step", "layer", "progressive"] = Field(
        "step",
        description='targets in turn by "step" or "layer", each shipping a student; "progressive": one after the '
        "other towards grid, which alone ships",
    )
    rules: tuple[tuple[str, str], ...] = Field((), description="(layer pattern, grid) exceptions, first match wins")
    fraction: float = Field(0.3, ge=0, le=1, description="share of the steps, at the end, that train on the grid")
    learned_ranges: bool = Field(False, description="train scales and palettes too (LSQ)")
    range_rate: float = Field(0.1, gt=0, description="their rate relative to the weights'")
    ranges_first: float = Field(0.0, ge=0, lt=1, description="share of a grid's steps that train its ranges alone")
    palette_temperature: float | None = Field(None, gt=0, description="differentiable palettes (DKM) at this one")
    activations: Literal["int8-token", "mxfp8", "nvfp4"] | None = Field(
        None, description="simulate this grid for the inputs of linear layers"
    )
    self_teacher: float = Field(
        0.0, ge=0, description="weight of the KL to the student's own float copy, from the quantised phase on (QAD)"
    )
    stability: Stability | None = Field(None, description="watch the quantised phase and act; None leaves it out")

    @model_validator(mode="before")
    @classmethod
    def _first_target(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("targets") and given.get("order") != "progressive":
            first = given["targets"][0]
            if given.setdefault("grid", first) != first:
                raise ValueError(f"targets: the first one, {first}, must be grid, {given['grid']}; leave grid out")
        return given

    @model_validator(mode="after")
    def _possible(self) -> Quantisation:
        if self.ranges_first and not self.learned_ranges:
            raise ValueError("ranges_first: nothing would train; set learned_ranges: true")
        if self.ranges_first and len(self.targets) > 1 and self.order != "progressive":
            raise ValueError("ranges_first: several targets train in turn, so no phase is theirs alone")
        if self.grid == "float" and (self.targets or self.self_teacher):
            raise ValueError("grid: float leaves nothing to quantise; targets and self_teacher need a grid")
        return self


class Training(Section):
    """The loop."""

    steps: int = Field(1000, gt=0, description="updates")
    accumulate: int = Field(1, gt=0, description="batches per update; weighted by tokens, so equal to one big batch")
    checkpoint_layers: bool = Field(False, description="recompute layers in the backward pass: less memory, slower")
    evaluate_every: int = Field(200, gt=0, description="updates between validations")
    evaluate_batches: int = Field(8, gt=0, description="validation batches used during training")
    save_every: int = Field(200, gt=0, description="updates between checkpoints")


class Evaluation(Section):
    """What is measured at the end."""

    baseline: bool = Field(True, description="train a twin without the teacher on the same batches, to compare")
    batches: int = Field(16, gt=0, description="validation batches for NLL, KL and agreement")
    tool_calls: int = Field(0, ge=0, description="held-out requests to answer per set (0 leaves tool calls out)")
    max_tokens: int = Field(96, gt=0, description="longest answer")
    rows: int = Field(16, gt=0, description="answers generated side by side")
    timed: int = Field(
        0, ge=0, description="of these requests so many are timed alone, at each validation and at the end; 0 for none"
    )

    @model_validator(mode="after")
    def _requests(self) -> Evaluation:
        if self.timed and not self.tool_calls:
            raise ValueError("timed: the requests are those of tool_calls, which is 0")
        return self


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
    on_policy: OnPolicy | None = Field(None, description="train on the student's own text too; None: on data alone")
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
        names = [(term.name, term.teacher) for term in self.loss]
        if len(set(names)) != len(names):
            raise ValueError("loss: a term stands twice")
        self._check_teachers()
        return self

    def _check_latency(self) -> None:
        acting = {term.name: term for term in self.loss if term.weight > 0}
        if acting and not acting.keys() - {"expected_length", "rollout_length"}:
            raise ValueError("loss: shortness alone teaches to stop; add a term that teaches the answers")
        if rollout := acting.get("rollout_length"):
            if self.on_policy is None:
                raise ValueError("rollout_length: it weighs what the student writes; set on_policy")
            if self.on_policy.temperature != rollout.temperature:
                raise ValueError(
                    "rollout_length: its temperature must be that of on_policy, where its samples come from"
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
            raise ValueError("on_policy: a cache knows nothing of what the student writes; leave teacher.cache out")
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
