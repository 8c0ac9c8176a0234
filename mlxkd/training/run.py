"""A whole run: train the student and its twin without a teacher, judge both, leave a run folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress

from mlxkd import quant
from mlxkd.data.batching import Batches
from mlxkd.errors import UserError
from mlxkd.files import atomic_file, file_hash, write_json
from mlxkd.losses.hidden import HiddenMatch, Projectors
from mlxkd.losses.term import Term
from mlxkd.quant.plan import DEFAULT_TARGET
from mlxkd.recipe import Recipe
from mlxkd.recipe_sections import Loss
from mlxkd.runtime import peak_process_memory
from mlxkd.students.checkpointing import checkpoint_layers
from mlxkd.students.split import Split
from mlxkd.teachers.identity import teacher_identity, tokenizer_hash
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.teach import teach
from mlxkd.training import state
from mlxkd.training.callbacks import MetricsFile, ProgressBar
from mlxkd.training.feed import WrittenText
from mlxkd.training.judging import deployed, judge, validate
from mlxkd.training.loop import Trainer
from mlxkd.training.quantised import QuantisedPhase
from mlxkd.training.result import RunResult
from mlxkd.training.setup import Setup, prepare, teacher_folder
from mlxkd.training.terms import terms_of
from mlxkd.training.voices import check_voices, teachers

STUDENT, BASELINE = "student", "baseline"
CROSS_ENTROPY = (Loss(name="cross_entropy"),)


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
    check_voices(setup)
    _open_folder(folder, recipe, resume)
    for line in setup.batches.report.lines():
        console.print(line, style="dim", highlight=False)
    fresh = quant.clone(setup.student)
    _train_one(setup, setup.student, STUDENT, terms_of(recipe.loss), folder, resume, console)
    twin = None
    if recipe.evaluation.baseline:
        twin = fresh
        _train_one(setup, twin, BASELINE, terms_of(CROSS_ENTROPY), folder, resume, console)
    contenders = judge(setup, twin, console)
    ship(setup, folder / "student")
    for target in setup.further_targets:
        ship(setup, folder / f"student-{target}", target)
    seconds = time.perf_counter() - started
    peak = max(mx.get_peak_memory(), peak_process_memory())
    return RunResult(recipe, folder, contenders, seconds, peak, setup.batches.report.lines())


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
    trainer.quantised.round_off(student)


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
        teacher=teachers(setup, batches.examples) if needs_teacher else None,
        quantised=_quantised(setup, name, folder / "checkpoints" / name),
        folder=folder / "checkpoints" / name,
        data=setup.data,
        validate=lambda model: validate(setup, model),
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


def _batches(setup: Setup, student: nn.Module) -> Batches | WrittenText:
    """Data, or data and text that student or teacher write."""
    recipe, wanted = setup.recipe, setup.recipe.on_policy
    if wanted is None:
        return setup.batches
    stop = frozenset(int(token) for token in setup.tokenizer.eos_token_ids)
    total = recipe.training.steps * recipe.training.accumulate
    return WrittenText(setup.batches, wanted, student, setup.teacher, stop, recipe.seed, total)


def fill_cache(recipe: Recipe, out: Path, console: Console) -> int:
    """Store what the recipe's teacher says about the recipe's training data; returns the number of texts.

    Raises:
        UserError: a cache of something else in ``out``, or a recipe without a term that reads a teacher.
    """
    setup = prepare(recipe)
    if setup.reference is None:
        raise UserError(
            "a cache holds token ids, and this recipe's teacher has another tokenizer than its student",
            where="loss",
            hint="train with the live teacher, or ask it for text: `mlxkd teach --endpoint`",
        )
    temperatures = sorted({term.temperature for term in terms_of(recipe.loss) if term.needs_teacher})
    if not temperatures:
        raise UserError("no term of the loss reads a teacher", where="loss", hint="add forward_kl")
    with Progress(console=console) as progress:
        task = progress.add_task("asking the teacher", total=None)
        store = teach(
            LocalTeacher(setup.teacher),
            setup.batches.examples,
            out,
            identity=teacher_identity(teacher_folder(recipe.teacher.model)),
            tokenizer=tokenizer_hash(setup.tokenizer),
            temperatures=temperatures,
            form="sampled" if recipe.teacher.form == "sampled" else "bucket",
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return len(store)


def ship(setup: Setup, folder: Path, target: str = DEFAULT_TARGET) -> None:
    """Write the packed student of a target, codes made once, with everything that tells where it came from."""
    recipe = setup.recipe
    metadata = {
        "recipe": recipe.identity(),
        "seed": recipe.seed,
        "data": setup.data,
        "teacher": {
            "model": recipe.teacher.model,
            "tokenizer": file_hash(_tokenizer_file(teacher_folder(recipe.teacher.model))),
        },
    }
    packed = deployed(setup.student, setup.config, target)
    quant.save_student(folder, packed, setup.tokenizer_folder, metadata)
    if setup.default_tools:
        write_json(folder / "tools.json", setup.default_tools)


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise UserError("no tokenizer.json or tokenizer.model", where=str(folder))
