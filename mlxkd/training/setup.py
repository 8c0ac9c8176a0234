"""From a recipe to everything a run needs: teacher, student, batches, held-out cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat, quant
from mlxkd.data.batching import Batch, Batches
from mlxkd.data.example import Example
from mlxkd.data.records import Record, load_records
from mlxkd.data.render import RenderOptions, render_all
from mlxkd.demo import DEMO_TEACHER, world
from mlxkd.errors import UserError
from mlxkd.evaluation.answers import cut_to_answers
from mlxkd.quant.plan import DEFAULT_TARGET
from mlxkd.recipe import Recipe
from mlxkd.students import importance, prune
from mlxkd.students.freezing import freeze
from mlxkd.students.lora import LoRA, attach
from mlxkd.teachers.identity import check_same_tokenizer
from mlxkd.training.state import data_hash
from mlxkd.training.terms import crossing

HELD_OUT: tuple[world.Set, ...] = ("known", "composed")
Cases = dict[str, list[dict[str, Any]]]


@dataclass
class Setup:
    """What a recipe stands for.

    Args:
        recipe: the recipe.
        teacher: frozen, in the dtype that is fast here.
        teachers: further ones by name.
        student: fp32 masters, where training starts.
        config: the student's config.json.
        tokenizer: mlx-lm's wrapper, the student's; the teacher's too, but where ``foreign`` says otherwise.
        tokenizer_folder: whose tokenizer files ship with the student.
        foreign: tokenizers of the teachers that do not share the student's, by teacher ("teacher" is the first).
        batches: training batches.
        valid: validation batches, in a fixed order.
        cases: held-out requests by set; empty when tool calls are not evaluated.
        plans: target -> (layer path -> grid); the default target is the student that ships.
        data: hash of the training examples.
        default_tools: schemas that a demo student is given when a person names none.
    """

    recipe: Recipe
    teacher: nn.Module
    teachers: dict[str, nn.Module]
    student: nn.Module
    config: dict[str, Any]
    tokenizer: Any
    tokenizer_folder: Path
    foreign: dict[str, Any]
    batches: Batches
    valid: list[Batch]
    cases: Cases
    plans: dict[str, quant.plan.Plan]
    data: str
    default_tools: list[dict[str, Any]]

    @property
    def reference(self) -> nn.Module | None:
        """The teacher that figures are compared with token by token; None where it has another tokenizer."""
        return None if "teacher" in self.foreign else self.teacher

    @property
    def further_targets(self) -> list[str]:
        """Targets that ship students of their own beside the first."""
        if self.recipe.quantisation.order == "progressive":
            return []
        return [target for target in self.plans if target != DEFAULT_TARGET]


def prepare(recipe: Recipe) -> Setup:
    """Load and check everything before the first update.

    Raises:
        UserError: anything missing or mismatched, with what to do about it.
    """
    mx.random.seed(recipe.seed)
    crossed = crossing(recipe)
    folder, teacher, teacher_config = _teacher(recipe.teacher.model)
    tokenizer, foreign = compat.load_tokenizer(folder, teacher_config), dict[str, Any]()
    if "teacher" in crossed:
        foreign["teacher"] = tokenizer
        folder = _tokenizer_folder(str(recipe.student.model))
        tokenizer = compat.load_tokenizer(folder)
    teachers = dict[str, nn.Module]()
    for name, wanted in recipe.teachers.items():
        further, teachers[name], config = _teacher(wanted.model)
        theirs = compat.load_tokenizer(further, config)
        if name in crossed:
            foreign[name] = theirs
        else:
            check_same_tokenizer(theirs, tokenizer, where=f"teachers.{name}")
    records, valid_records, cases = _records(recipe)
    turns = recipe.data.turns
    options = RenderOptions(turns=turns, weights=recipe.data.weights, direct_calls=recipe.data.direct_calls)
    train = render_all(records, tokenizer, options)
    # Validation figures keep their meaning whatever the weights.
    valid = render_all(valid_records, tokenizer, RenderOptions(turns=turns))
    student, config = _student(recipe, teacher, teacher_config, tokenizer, train)
    batches = _batches(recipe, train, recipe.seed)
    return Setup(
        recipe,
        teacher,
        teachers,
        student,
        config,
        tokenizer,
        folder,
        foreign,
        batches,
        _validation(recipe, valid),
        cases,
        _plans(recipe, student),
        data_hash(batches.examples),
        world.default_tools() if recipe.data.demo else [],
    )


def _plans(recipe: Recipe, student: nn.Module) -> dict[str, quant.plan.Plan]:
    """Where each target puts the layers; a target that leaves all of them float has no plan."""
    wanted = recipe.quantisation
    if wanted.grid == "float" and not wanted.rules:
        return {}
    grids = {DEFAULT_TARGET: wanted.grid} | {name: name for name in wanted.targets if name != wanted.grid}
    plans = {target: quant.plan_for(student, name, wanted.rules) for target, name in grids.items()}
    return {target: plan for target, plan in plans.items() if set(plan.values()) - {"float"}}


def teacher_folder(model: str) -> Path:
    """Where a recipe's teacher lies."""
    return compat.resolve_model(DEMO_TEACHER if model == "demo" else model)


def _teacher(model: str) -> tuple[Path, nn.Module, dict[str, Any]]:
    """Folder, frozen model and config of a teacher."""
    folder = teacher_folder(model)
    teacher, config = compat.load_model(folder, lazy=True)
    teacher = to_fast_dtype(teacher)
    teacher.freeze()
    return folder, teacher, config


def _tokenizer_folder(model: str) -> Path:
    """Where a student that has a tokenizer of its own keeps it."""
    path = Path(model)
    folder = path.parent if path.is_file() else compat.resolve_model(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            "gold and uld need the student's own tokenizer, and there is none beside its config",
            where=str(folder),
            hint="put tokenizer.json or tokenizer.model into the folder of student.model",
        )
    return folder


def to_fast_dtype(model: nn.Module) -> nn.Module:
    """Float weights in fp32 on a CPU, whose half-precision products are far slower; unchanged on a GPU."""
    if mx.default_device().type == mx.DeviceType.cpu:
        half = (mx.float16, mx.bfloat16)
        model.update(tree_map(lambda p: p.astype(mx.float32) if p.dtype in half else p, model.parameters()))
    return model


def _records(recipe: Recipe) -> tuple[list[Record], list[Record], Cases]:
    """Training records, validation records, and held-out conversations to answer."""
    data = recipe.data
    if data.demo:
        train = list(world.conversations("train", recipe.seed + 1000, data.demo.train))
        share = data.demo.valid // len(HELD_OUT)
        valid = [r for split in HELD_OUT for r in world.conversations(split, recipe.seed + 2000, share)]
        count = recipe.evaluation.tool_calls
        cases: Cases = {split: _demo_cases(split, recipe.seed + 3000, count) for split in HELD_OUT} if count else {}
        return _as_records(train, "demo/train"), _as_records(valid, "demo/valid"), cases
    assert data.train is not None
    records = load_records(data.train, data.limit)
    if data.valid:
        held = load_records(data.valid, split="valid")
    elif len(records) == 1 and records[0].kind == "text":
        records, held = _split_text(records[0], data.valid_share)
    else:
        count = max(1, round(data.valid_share * len(records)))
        records, held = records[:-count], records[-count:]
    if not records:
        raise UserError("nothing is left to train on", where=data.train, hint="give more data or data.valid")
    limit = recipe.evaluation.tool_calls
    answers = [{"messages": r.messages, "tools": r.tools} for r in held if r.kind == "messages" and r.tools]
    return (
        records,
        held,
        {"valid": [c for a in answers for c in cut_to_answers(a)][:limit]} if answers and limit else {},
    )


def _split_text(record: Record, share: float) -> tuple[list[Record], list[Record]]:
    """One long document: its last part, from a paragraph border on, is for validation."""
    cut = record.text.find("\n\n", int(len(record.text) * (1 - share)))
    cut = cut if cut > 0 else int(len(record.text) * (1 - share))
    parts = record.text[:cut], record.text[cut:].lstrip("\n")
    return tuple([Record("text", text=part, source=record.source)] for part in parts)  # type: ignore[return-value]


def _demo_cases(split: world.Set, seed: int, count: int) -> list[dict[str, Any]]:
    """``count`` requests whose expected answer is each conversation's first assistant turn."""
    return [cut_to_answers(record)[0] for record in world.conversations(split, seed, count)]


def _as_records(raw: Iterable[dict[str, Any]], source: str) -> list[Record]:
    return [
        Record("messages", messages=tuple(r["messages"]), tools=tuple(r["tools"]), source=f"{source}:{i}")
        for i, r in enumerate(raw, 1)
    ]


def _batches(recipe: Recipe, examples: Sequence[Example], seed: int) -> Batches:
    data = recipe.data
    return Batches(examples, data.shapes, seed, mix=data.mix, too_long=data.too_long)


def _validation(recipe: Recipe, examples: Sequence[Example]) -> list[Batch]:
    data = recipe.data
    batches = Batches(examples, data.shapes, seed=0, too_long=data.too_long)
    return [batches.batch(i) for i in range(min(len(batches), recipe.evaluation.batches))]


def _student(
    recipe: Recipe, teacher: nn.Module, teacher_config: dict[str, Any], tokenizer: Any, examples: Sequence[Example]
) -> tuple[nn.Module, dict[str, Any]]:
    wanted = recipe.student
    if wanted.start == "prune":
        model, config = _pruned(recipe, teacher, teacher_config, examples)
    elif wanted.start == "config":
        config = _read_config(Path(str(wanted.model)))
        model = compat.build_model(config)
    else:
        folder = compat.resolve_model(str(wanted.model))
        model, config = compat.load_model(folder)
        check_same_tokenizer(compat.load_tokenizer(folder, config), tokenizer, where=str(folder))
    _check_vocabulary(config, len(tokenizer.get_vocab()))
    if "quantization" in config:
        _check_packed_start(recipe)
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    if wanted.lora:
        attach(model, LoRA(**wanted.lora.model_dump()))
    freeze(model, wanted.frozen)
    model.train()
    mx.eval(model.parameters())
    return model, config


def _pruned(
    recipe: Recipe, teacher: nn.Module, teacher_config: dict[str, Any], examples: Sequence[Example]
) -> tuple[nn.Module, dict[str, Any]]:
    """Parts of the teacher: named, or chosen by what they do on the first training batch."""
    wanted = recipe.student

    def probe() -> np.ndarray:
        return _batches(recipe, examples[:64], 0).batch(0).inputs

    layers: Sequence[int] = wanted.layers or range(teacher_config["num_hidden_layers"])
    if wanted.depth:
        layers = importance.deepest_layers(teacher, probe(), wanted.depth)
    model, config = prune.depth(teacher, teacher_config, tuple(layers))
    if wanted.mlp_width and wanted.mlp_channels == "leading":
        channels: Sequence[Sequence[int]] = [range(wanted.mlp_width)] * config["num_hidden_layers"]
        model, config = prune.width(model, config, channels=channels)
    elif wanted.mlp_width:
        model, config = prune.width(model, config, channels=importance.mlp_channels(model, probe(), wanted.mlp_width))
    if wanted.kv_heads:
        groups = config.get("num_key_value_heads") or config["num_attention_heads"]
        kept = importance.attention_groups(model, probe(), groups, wanted.kv_heads)
        model, config = prune.width(model, config, groups=kept)
    return model, config


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"this config cannot be read: {error}", where=str(path)) from error


def _check_packed_start(recipe: Recipe) -> None:
    """A student whose codes are fixed: only adapters can train on it, and its grid is the one it has."""
    if recipe.student.lora is None:
        raise UserError(
            "the student is already quantised; its float weights are gone",
            where=str(recipe.student.model),
            hint="start from the unquantised model, or train adapters on this one: student.lora",
        )
    if recipe.quantisation.grid != "float" or recipe.quantisation.rules:
        raise UserError(
            "the student is already quantised, and rounding it to a grid again would change its codes",
            where="quantisation.grid",
            hint='set grid to "float": layers with adapters become float, the others keep their codes',
        )


def _check_vocabulary(student: dict[str, Any], tokens: int) -> None:
    """Padded vocabularies may differ in size, but every token needs a row."""
    size = student.get("vocab_size")
    if size is None or size < tokens:
        raise UserError(
            f"the student's vocabulary of {size} is smaller than the tokenizer's {tokens}",
            where="student",
            hint=f"set vocab_size to {tokens} or more",
        )
