"""A whole run: train the student and its twin without a teacher, judge both, leave a run folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress

from mlxkd import quant
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.evaluation.agreement import agreement
from mlxkd.evaluation.answers import Answer, answer_all
from mlxkd.evaluation.clocks import Summary
from mlxkd.evaluation.speed import time_answers
from mlxkd.evaluation.toolcalls.scoring import aggregate
from mlxkd.files import atomic_file, file_hash, write_json
from mlxkd.losses.hidden import HiddenMatch, Projectors
from mlxkd.losses.term import Term
from mlxkd.metric import Metric
from mlxkd.quant.plan import DEFAULT_TARGET
from mlxkd.recipe import Recipe
from mlxkd.recipe_sections import Loss, Teacher
from mlxkd.runtime import artefact_metadata, device_name, peak_process_memory, row_streams
from mlxkd.students.checkpointing import checkpoint_layers
from mlxkd.students.split import Split
from mlxkd.teachers.cached import CachedTeacher
from mlxkd.teachers.identity import teacher_identity, tokenizer_hash
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.routed import RoutedTeachers
from mlxkd.teachers.teach import teach
from mlxkd.training import state
from mlxkd.training.callbacks import MetricsFile, ProgressBar, Values
from mlxkd.training.feed import StudentText
from mlxkd.training.loop import Trainer
from mlxkd.training.quantised import QuantisedPhase
from mlxkd.training.setup import Setup, prepare, teacher_folder
from mlxkd.trees import leaves

STUDENT, BASELINE = "student", "baseline"
CROSS_ENTROPY = (Loss(name="cross_entropy"),)


@dataclass
class Contender:
    """One column of the final table.

    Args:
        title: for people.
        parameters: weights, counted before packing.
        bytes: size of the weights as they lie in memory.
        metrics: figures by name; tool-call figures are prefixed with their set.
        answers: what it wrote, by set.
    """

    title: str
    parameters: int
    bytes: int
    metrics: dict[str, Metric]
    answers: dict[str, list[Answer]] = field(default_factory=dict)


@dataclass
class RunResult:
    """What a run found."""

    recipe: Recipe
    folder: Path
    contenders: dict[str, Contender]
    seconds: float
    peak_bytes: int
    data_lines: list[str]


def train(recipe: Recipe, out: Path, *, resume: bool, console: Console) -> RunResult:
    """Run a recipe.

    Args:
        recipe: what to do.
        out: parent of the run folder.
        resume: continue from the last checkpoints.
        console: for bars and remarks (stderr).

    Returns:
        The final table, also written to the run folder with the packed student.

    Raises:
        Interrupted: stopped by the person; checkpoints are saved.
        UserError: anything a person can mend, before or during the run.
    """
    started = time.perf_counter()
    mx.reset_peak_memory()
    folder = out / recipe.name
    setup = prepare(recipe)
    _open_folder(folder, recipe, resume)
    for line in setup.batches.report.lines():
        console.print(line, style="dim", highlight=False)
    fresh = quant.clone(setup.student)
    _train_one(setup, setup.student, STUDENT, terms_of(recipe.loss), folder, resume, console)
    twin = None
    if recipe.evaluation.baseline:
        twin = fresh
        _train_one(setup, twin, BASELINE, terms_of(CROSS_ENTROPY), folder, resume, console)
    contenders = _judge(setup, twin, console)
    ship(setup, folder / "student")
    for target in further_targets(setup):
        ship(setup, folder / f"student-{target}", target)
    seconds = time.perf_counter() - started
    peak = max(mx.get_peak_memory(), peak_process_memory())
    return RunResult(recipe, folder, contenders, seconds, peak, setup.batches.report.lines())


def terms_of(losses: Sequence[Loss]) -> list[Term]:
    return [
        Term(loss.name, loss.weight, loss.temperature, loss.options, loss.teacher) for loss in losses if loss.weight > 0
    ]


def _open_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if not resume:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    with atomic_file(folder / "recipe.yaml") as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")


def _train_one(
    setup: Setup, student: nn.Module, name: str, terms: list[Term], folder: Path, resume: bool, console: Console
) -> None:
    """Train one student in place; ends with the weights of its best validation."""
    recipe = setup.recipe
    if recipe.training.checkpoint_layers:
        checkpoint_layers(student)
    trainer = make_trainer(setup, student, name, terms, folder)
    if resume and (trainer.folder / "last" / state.FACTS).exists():
        trainer.resume()
    first = trainer.position.step
    with ProgressBar(name, recipe.training.steps, first, console) as bar:
        trainer.callbacks = (MetricsFile(folder / "metrics.jsonl", name, first), bar)
        trainer.run()
    trainer.restore_best()


def make_trainer(setup: Setup, student: nn.Module, name: str, terms: list[Term], folder: Path) -> Trainer:
    """The trainer of the student or of its twin, whose name says which; checkpoints go below ``folder``."""
    match = _hidden_match(setup) if name == STUDENT else None
    needs_teacher = match is not None or any(term.needs_teacher for term in terms)
    batches = _batches(setup, student) if name == STUDENT else setup.batches
    return Trainer(
        recipe=setup.recipe,
        student=student,
        batches=batches,
        terms=terms,
        teacher=_teachers(setup, batches.examples) if needs_teacher else None,
        quantised=_quantised(setup, name, folder / "checkpoints" / name),
        folder=folder / "checkpoints" / name,
        data=setup.data,
        validate=lambda model: _validate(setup, model),
        tokenizer=setup.tokenizer,
        match=match,
    )


def _quantised(setup: Setup, name: str, folder: Path) -> QuantisedPhase:
    """The quantised phase of the student, or of its twin, which has no teacher of any kind and is not watched."""
    recipe, options = setup.recipe, setup.recipe.quantisation
    if name != STUDENT:
        options = options.model_copy(update={"self_teacher": 0.0, "stability": None})
    watched = options.stability
    rows, positions = watched.probe if watched else (1, 1)
    probe = mx.array(setup.valid[0].inputs[:rows, :positions])
    return QuantisedPhase(options, setup.plans, recipe.training.steps, folder, setup.config, probe)


def _hidden_match(setup: Setup) -> HiddenMatch | None:
    """What the recipe wants matched, with fresh projectors."""
    wanted = setup.recipe.hidden
    if wanted is None:
        return None
    ours, theirs = (Split(model, verify=False).width for model in (setup.student, setup.teacher))
    projectors = Projectors(len(wanted.layers), ours, theirs)
    return HiddenMatch(wanted.layers, projectors, wanted.kind, wanted.weight, wanted.positions)


def _batches(setup: Setup, student: nn.Module) -> Batches | StudentText:
    """Data, or data and the student's own text."""
    recipe, wanted = setup.recipe, setup.recipe.on_policy
    if wanted is None:
        return setup.batches
    stop = frozenset(int(token) for token in setup.tokenizer.eos_token_ids)
    total = recipe.training.steps * recipe.training.accumulate
    return StudentText(setup.batches, wanted, student, setup.teacher, stop, recipe.seed, total)


def _teachers(setup: Setup, examples: Sequence[Example]) -> LocalTeacher | CachedTeacher | RoutedTeachers:
    """The teacher, or all of them with their routes. Each is live or what it said once."""
    recipe = setup.recipe
    first = _voice(setup, setup.teacher, recipe.teacher, setup.tokenizer_folder)
    if not recipe.teachers:
        return first
    others = {
        name: _voice(setup, setup.teachers[name], wanted, teacher_folder(wanted.model))
        for name, wanted in recipe.teachers.items()
    }
    return RoutedTeachers({"teacher": first, **others}, examples, recipe.routes)


def _voice(setup: Setup, model: nn.Module, wanted: Teacher, folder: Path) -> LocalTeacher | CachedTeacher:
    if wanted.cache is None:
        return LocalTeacher(model, streams=row_streams())
    names = {"tokenizer": tokenizer_hash(setup.tokenizer), "teacher": teacher_identity(folder)}
    return CachedTeacher(Path(wanted.cache), setup.batches.examples, **names)


def fill_cache(recipe: Recipe, out: Path, console: Console) -> int:
    """Store what the recipe's teacher says about the recipe's training data; returns the number of texts.

    Raises:
        UserError: a cache of something else in ``out``, or a recipe without a term that reads a teacher.
    """
    setup = prepare(recipe)
    temperatures = sorted({term.temperature for term in terms_of(recipe.loss) if term.needs_teacher})
    if not temperatures:
        raise UserError("no term of the loss reads a teacher", where="loss", hint="add forward_kl")
    with Progress(console=console) as progress:
        task = progress.add_task("asking the teacher", total=None)
        store = teach(
            LocalTeacher(setup.teacher),
            setup.batches.examples,
            out,
            identity=teacher_identity(setup.tokenizer_folder),
            tokenizer=tokenizer_hash(setup.tokenizer),
            temperatures=temperatures,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return len(store)


def _validate(setup: Setup, model: nn.Module) -> Values:
    """Validation figures on the kernels that ship: packed as soon as the model lies on its grid."""
    judged = quant.pack(model, setup.config).model if quant.attached(model) else model
    batches = setup.valid[: setup.recipe.training.evaluate_batches]
    found = agreement(judged, setup.teacher, batches, device_name())
    values = {name: metric.value for name, metric in found.items()}
    seen: Values = {"loss": values["nll"], "kl": values["kl"], "top1": values["top1"]}
    for name, metric in _clocks(setup, judged).items():
        if name in ("ttft", "tpot", "ttfa_ms", "ttfa_tokens"):
            # JSON knows no infinity: a median that falls on a request without a valid call is missing.
            seen[name] = metric.value if metric.value is not None and math.isfinite(metric.value) else None
            seen[f"{name}_censored"] = metric.censored
    return seen


def _clocks(setup: Setup, model: nn.Module) -> dict[str, Metric]:
    """Latencies of lone requests after a warm-up, where the recipe wants them."""
    wanted = setup.recipe.evaluation
    cases = [case for part in setup.cases.values() for case in part][: wanted.timed]
    if not cases:
        return {}
    timed = time_answers(model, setup.tokenizer, [cases[0], *cases], max_tokens=wanted.max_tokens)
    return Summary(1, [timing for timing, _ in timed]).metrics(device_name())


def _judge(setup: Setup, twin: nn.Module | None, console: Console) -> dict[str, Contender]:
    """Judge teacher, float student, packed student and packed twin on the same held-out inputs."""
    student = setup.student
    models: dict[str, tuple[str, nn.Module]] = {"teacher": ("teacher", setup.teacher)}
    models["float"] = ("student, unpacked", quant.detach(quant.clone(student)))
    models["student"] = ("student", _packed(student, setup.config))
    for target in further_targets(setup):
        models[f"student@{target}"] = (f"student, {target}", quant.pack(student, setup.config, target=target).model)
    if twin is not None:
        models["baseline"] = ("twin without teacher", _packed(twin, setup.config))
    answers = sum(len(cases) for cases in setup.cases.values())
    steps = len(models) * (answers + 1)
    with Progress(console=console) as progress:
        task = progress.add_task("judging", total=steps)

        def tick() -> None:
            progress.advance(task)

        return {key: _contender(setup, title, model, tick) for key, (title, model) in models.items()}


def _packed(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    return quant.pack(model, config).model if quant.attached(model) else model


def _contender(setup: Setup, title: str, model: nn.Module, tick: Any) -> Contender:
    device = device_name()
    metrics = agreement(model, setup.teacher, setup.valid, device)
    tick()
    answers: dict[str, list[Answer]] = {}
    options = setup.recipe.evaluation
    for name, cases in setup.cases.items():
        answers[name] = answer_all(
            model, setup.tokenizer, cases, max_tokens=options.max_tokens, rows=options.rows, on_answer=tick
        )
        scores = aggregate([a.score for a in answers[name]], device)
        metrics |= {f"{name}/{key}": metric for key, metric in scores.items()}
    if answers:
        everything = aggregate([a.score for part in answers.values() for a in part], device)
        metrics |= {f"all/{key}": metric for key, metric in everything.items()}
    metrics |= {f"speed/{name}": metric for name, metric in _clocks(setup, model).items()}
    weights = leaves(model.parameters())
    return Contender(title, _count(model), sum(w.nbytes for _, w in weights), metrics, answers)


def _count(model: nn.Module) -> int:
    """Weights of a model; packed ones count as the weights they stand for."""
    total = 0
    modules = dict(model.named_modules())
    for path, value in leaves(model.parameters()):
        module = modules.get(path.rpartition(".")[0])
        bits = getattr(module, "bits", None)
        if bits and path.endswith(".weight"):
            total += value.size * 32 // bits
        elif not (bits and path.endswith((".scales", ".biases"))):
            total += value.size
    return total


def further_targets(setup: Setup) -> list[str]:
    """Targets that ship students of their own beside the first."""
    if setup.recipe.quantisation.order == "progressive":
        return []
    return [target for target in setup.plans if target != DEFAULT_TARGET]


def ship(setup: Setup, folder: Path, target: str = DEFAULT_TARGET) -> None:
    """Write the packed student of a target, codes made once, with everything that tells where it came from."""
    recipe = setup.recipe
    metadata = {
        "recipe": recipe.identity(),
        "seed": recipe.seed,
        "data": setup.data,
        "teacher": {"model": recipe.teacher.model, "tokenizer": file_hash(_tokenizer_file(setup.tokenizer_folder))},
    }
    packed = quant.pack(setup.student, setup.config, target=target)
    quant.save_student(folder, packed, setup.tokenizer_folder, metadata)
    if setup.default_tools:
        write_json(folder / "tools.json", setup.default_tools)


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise UserError("no tokenizer.json or tokenizer.model", where=str(folder))


def gap_closed(result: RunResult) -> Metric:
    """Share of the distance from the twin to the teacher that the student covers, in exact calls."""
    exact = {key: c.metrics.get("all/exact") for key, c in result.contenders.items()}
    values = [m.value for key in ("teacher", "baseline", "student") if (m := exact.get(key)) and m.value is not None]
    if len(values) < 3:
        return Metric(None, "share", "measured", device_name(), note="needs tool calls and a baseline")
    teacher, baseline, student = values
    if math.isclose(teacher, baseline) or teacher < baseline:
        return Metric(None, "share", "measured", device_name(), note="the baseline already equals the teacher")
    cases = exact["student"]
    return Metric(
        (student - baseline) / (teacher - baseline), "share", "measured", device_name(), cases.n if cases else 0
    )


def to_json(result: RunResult) -> dict[str, Any]:
    """The content of report.json."""
    contenders = {
        key: {
            "title": c.title,
            "parameters": c.parameters,
            "bytes": c.bytes,
            "metrics": {name: metric.to_json() for name, metric in c.metrics.items()},
        }
        for key, c in result.contenders.items()
    }
    return {
        "name": result.recipe.name,
        "recipe": result.recipe.model_dump(mode="json"),
        "made_by": artefact_metadata(),
        "contenders": contenders,
        "gap_closed": gap_closed(result).to_json(),
        "minutes": Metric(result.seconds / 60, "minutes", "measured", device_name()).to_json(),
        "peak_gb": Metric(result.peak_bytes / 1e9, "GB", "measured", device_name()).to_json(),
        "data": result.data_lines,
    }
