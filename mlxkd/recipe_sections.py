"""The sections of a recipe: typed groups of keys, each checked on its own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A group of keys; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(Section):
    """Who is imitated."""

    model: str = Field("demo", description='model folder, Hugging Face repository, or "demo" for the embedded teacher')
    cache: str | None = Field(None, description="store that `mlxkd teach` wrote: train from it instead of live")
    form: Literal["bucket", "renormalised", "sampled"] = Field(
        "bucket",
        description='what a cache is: likeliest ids with the rest as one "bucket"; the same "renormalised" without the '
        'rest, as mlx-lm\'s DWQ; or "sampled" draws, unbiased, for forward_kl alone',
    )


class Adapters(Section):
    """Low-rank updates, merged into the student when it ships."""

    rank: int = Field(8, gt=0, description="of the update")
    scale: float = Field(20.0, gt=0, description="factor on the update: mlx-lm's scale, not alpha")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the update, in training on float weights")
    layers: int | None = Field(None, gt=0, description="how many of the last layers; None adapts all")
    keys: tuple[str, ...] | None = Field(
        None, description="modules within a layer, like self_attn.q_proj; None takes all linear ones"
    )
    dora: bool = Field(False, description="split each weight into magnitude and direction (DoRA)")


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
    frozen: tuple[str, ...] = Field((), description='weights that do not train, as patterns: "*embed_tokens*"')
    lora: Adapters | None = Field(None, description="train adapters alone, on frozen weights; None trains everything")

    @model_validator(mode="after")
    def _source(self) -> Student:
        if self.start == "prune" and self.model:
            raise ValueError("start: prune takes its weights from the teacher; leave model out")
        if self.start != "prune" and not self.model:
            raise ValueError(f"start: {self.start} needs model")
        if self.start != "prune" and (self.layers or self.depth or self.mlp_width or self.kv_heads):
            raise ValueError("layers, depth, mlp_width and kv_heads belong to start: prune")
        if self.frozen and self.lora:
            raise ValueError("with lora nothing but the adapters trains; leave frozen out")
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
    """Train on what the student writes itself (GKD), corrected by the teacher at first (SKD), or the teacher writes."""

    writer: Literal["student", "teacher"] = Field(
        "student", description="who writes; the teacher where data are few (sequence-level distillation, LLM-QAT)"
    )
    share: float = Field(0.5, gt=0, le=1, description="share of the batches that are written anew")
    max_tokens: int = Field(64, gt=0, description="longest answer it writes")
    prompt: int = Field(1, gt=0, description="tokens of a plain text that are given before the writer goes on")
    temperature: float = Field(1.0, ge=0, description="of its sampling")
    corrected: float = Field(0.0, ge=0, le=1, description="share of the run, at its start, with corrected proposals")
    top: int = Field(25, gt=0, description="a proposal outside the teacher's likeliest so many is replaced")
    replay: float = Field(0.0, ge=0, le=1, description="share of the written batches drawn from recent ones")
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
    rounding: Literal["straight_through", "annealed"] = Field(
        "straight_through",
        description='in the training forward: "annealed" starts soft and sharpens until it rounds (affine, int8)',
    )
    learned_ranges: bool = Field(False, description="train scales and palettes too (LSQ)")
    fitted_ranges: bool = Field(
        False, description="start them where the squared error is small, not at the weights' extremes (affine)"
    )
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
        if self.fitted_ranges and not self.learned_ranges:
            raise ValueError("fitted_ranges: there is nothing to start; set learned_ranges: true")
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
