"""The latency losses by recipe: the training loop gives them their inputs."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from test_latency_collect import COMPACT, RECORDS
from toy_tokenizer import tokenizer_folder

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.render import RenderOptions, render_all
from mlxkd.errors import UserError
from mlxkd.losses.term import Term
from mlxkd.recipe import parse_recipe
from mlxkd.training.loop import Trainer
from mlxkd.training.quantised import QuantisedPhase

RECIPE = {
    "data": {"train": "d.jsonl", "weights": {"preamble": 0.1, "name": 2.0}},
    "loss": [
        {"name": "cross_entropy"},
        {"name": "early_call", "options": {"ramp": 0.0}},
        {"name": "expected_length", "options": {"margin": 0.1}},
    ],
    "quantisation": {"grid": "float", "fraction": 0.0},
    "training": {"steps": 3},
}


def trainer(folder: Path, tokenizer: object) -> Trainer:
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    real = compat.load_tokenizer(tokenizer_folder(folder / "tok", COMPACT))
    mx.random.seed(1)
    model = compat.build_model({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": len(real),
        "tie_word_embeddings": True,
    })  # fmt: skip
    examples = render_all(RECORDS, real, RenderOptions(weights=recipe.data.weights))
    terms = [Term(t.name, t.weight, t.temperature, t.options) for t in recipe.loss]
    return Trainer(
        recipe=recipe,
        student=model,
        batches=Batches(examples, [(3, 256)]),
        terms=terms,
        teacher=None,
        quantised=QuantisedPhase(recipe.quantisation, {}, 3, folder, {}, mx.zeros((1, 1), mx.int32)),
        folder=folder / "checkpoints",
        data="x",
        validate=lambda student: {"loss": 1.0},
        tokenizer=real if tokenizer is None else tokenizer,
    )


def test_the_loop_trains_with_the_latency_losses(tmp_path: Path) -> None:
    rows = []

    class Watch:
        def on_step(self, step: int, values: dict) -> None:
            rows.append(values)

        def on_validation(self, step: int, values: dict) -> None:
            pass

    run = trainer(tmp_path, None)
    run.callbacks = (Watch(),)
    run.run()
    assert len(rows) == 3
    assert rows[0]["loss/early_call"] > rows[-1]["loss/early_call"] > 0
    assert rows[0]["loss/expected_length"] > 0


def test_a_tokenizer_without_tool_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer has no tool calls, so no call can be early"):
        trainer(tmp_path, object()).run()
