"""Adapters from a recipe: what stays, what ships, and that a stopped run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from training_toys import quick

from mlxkd import compat
from mlxkd.cli import main
from mlxkd.errors import UserError
from mlxkd.recipe import load_recipe
from mlxkd.training.callbacks import Values, read_metrics
from mlxkd.training.loop import Trainer
from mlxkd.training.setup import prepare

KEYS = "[self_attn.q_proj, mlp.down_proj]"
PLAIN = {"hidden": "null", "evaluation__tool_calls": "0", "quantisation__stability": "null"}


def _arguments(teacher: Path, **changes: str) -> list[str]:
    return ["--teacher", str(teacher), *quick(**(PLAIN | changes))]


def _train(out: Path, arguments: list[str]) -> Path:
    result = CliRunner().invoke(main, ["train", "--out", str(out), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out / "demo"


def _merged(arrays: dict[str, mx.array], name: str, weight: mx.array, scale: float) -> np.ndarray:
    """The definition of LoRA (2106.09685) and DoRA (2402.09353), in float64."""
    a, b, w = (np.array(x, dtype=np.float64) for x in (arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"], weight))
    merged = w + scale * (a @ b).T
    if f"{name}.m" in arrays:
        merged *= np.array(arrays[f"{name}.m"], dtype=np.float64)[:, None] / np.linalg.norm(merged, axis=1)[:, None]
    return merged


def _best(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "checkpoints" / "student" / "best" / "arrays.safetensors"))
    return {name.removeprefix("model."): value for name, value in arrays.items() if name.startswith("model.")}


@pytest.mark.parametrize("dora", ["false", "true"])
def test_the_packed_student_is_the_merged_weight_rounded_once(dora: str, toy_teacher: Path, tmp_path: Path) -> None:
    """Every code comes from the merged float weight of the best checkpoint; what has no adapter is the teacher's."""
    lora = f"{{rank: 2, scale: 4.0, dora: {dora}, keys: {KEYS}}}"
    changes = {"student__lora": lora, "quantisation__learned_ranges": "false", "quantisation__self_teacher": "0"}
    folder = _train(tmp_path, _arguments(toy_teacher, student__mlp_width="null", **changes))
    arrays, shipped = _best(folder), mx.load(str(folder / "student" / "model.safetensors"))
    teacher = mx.load(str(toy_teacher / "model.safetensors"))
    name = "model.layers.1.self_attn.q_proj"
    assert np.abs(np.array(arrays[f"{name}.lora_b"])).max() > 0, "the adapter has not moved"
    merged = _merged(arrays, name, teacher["model.layers.2.self_attn.q_proj.weight"], 4.0)
    codes, _, _ = mx.quantize(mx.array(merged.astype(np.float32)), 32, 4)
    differ = np.mean(np.array(codes) != np.array(shipped[f"{name}.weight"]))
    assert differ < 2e-2, "float64 and float32 round a tie apart now and then, no more"
    kept, *_ = mx.quantize(teacher["model.embed_tokens.weight"].astype(mx.float32), 32, 4)
    assert np.array_equal(np.array(kept), np.array(shipped["model.embed_tokens.weight"]))
    assert not [key for key in shipped if "lora" in key]
    losses = [v["loss/forward_kl"] for v in read_metrics(folder / "metrics.jsonl") if "loss/forward_kl" in v]
    assert min(losses[-2:]) < losses[0]


def test_a_stopped_run_goes_on_bit_for_bit(toy_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose random state is part of the checkpoint; stopped inside the quantised phase."""
    arguments = _arguments(toy_teacher, student__lora="{rank: 2, dropout: 0.2, dora: true}")
    whole = _train(tmp_path / "a", arguments)
    update = Trainer.update

    def until_six(trainer: Trainer, step: int) -> Values:
        if step == 6:
            raise KeyboardInterrupt
        return update(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", until_six)
        stopped = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "b"), *arguments])
    assert stopped.exit_code != 0 and "--resume" in stopped.output
    resumed = _train(tmp_path / "b", [*arguments, "--resume"])
    one, two = ([v["loss"] for v in read_metrics(f / "metrics.jsonl") if "loss" in v] for f in (whole, resumed))
    assert len(one) == 8 and two == one
    first, second = (mx.load(str(f / "student" / "model.safetensors")) for f in (whole, resumed))
    assert all(np.array_equal(np.array(first[key]), np.array(second[key])) for key in first)


def test_on_a_quantised_student_the_other_layers_keep_their_codes(toy_teacher: Path, tmp_path: Path) -> None:
    model, config = compat.load_model(toy_teacher)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    base = tmp_path / "base"
    compat.save_model_folder(base, model, config, toy_teacher)
    start = f"{{start: folder, model: {base}, lora: {{rank: 2, scale: 4.0, keys: {KEYS}}}}}"
    arguments = _arguments(toy_teacher, student=start, quantisation="{grid: float}")
    arguments = _without(arguments, ("student.layers", "student.mlp_width", "quantisation."))
    folder = _train(tmp_path, arguments)
    before, after = mx.load(str(base / "model.safetensors")), mx.load(str(folder / "student" / "model.safetensors"))
    adapted = [f"model.layers.{i}.{key}" for i in range(3) for key in ("self_attn.q_proj", "mlp.down_proj")]
    for key, value in before.items():
        if key.rpartition(".")[0] not in adapted:
            assert np.array_equal(np.array(value.astype(mx.float32)), np.array(after[key].astype(mx.float32))), key
    arrays, name = _best(folder), adapted[0]
    plain = mx.dequantize(*(before[f"{name}.{part}"] for part in ("weight", "scales", "biases")), 32, 4)
    expected = _merged(arrays, name, plain, 4.0)
    assert np.allclose(np.array(after[f"{name}.weight"]), expected, atol=1e-6)
    loaded, shipped_config = compat.load_model(folder / "student")
    assert shipped_config["quantization"][name] is False
    assert isinstance(loaded.model.layers[0].self_attn.k_proj, nn.QuantizedLinear)


def _without(arguments: list[str], keys: tuple[str, ...]) -> list[str]:
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    return [word for pair in pairs if not pair[1].startswith(keys) for word in pair]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student__lora": "{rank: 0}"}, "student.lora.rank"),
        ({"student__lora": "{keys: [nothing]}"}, "student.lora.keys"),
        ({"student__lora": "{dropout: 0.1}", "training__checkpoint_layers": "true"}, "student.lora.dropout"),
    ],
)
def test_adapters_that_cannot_be(changes: dict[str, str], words: str, toy_teacher: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "x"), *_arguments(toy_teacher, **changes)])
    assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "x").exists()


def test_rounding_a_quantised_student_again_is_refused(toy_teacher: Path, tmp_path: Path) -> None:
    model, config = compat.load_model(toy_teacher)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    compat.save_model_folder(tmp_path / "base", model, config, toy_teacher)
    start = f"student={{start: folder, model: {tmp_path / 'base'}, lora: {{rank: 2}}}}"
    recipe = load_recipe("demo", (f"teacher.model={toy_teacher}", "data.demo={train: 8, valid: 4}", start))
    with pytest.raises(UserError, match="the student is already quantised, and rounding") as caught:
        prepare(recipe)
    assert "quantisation.grid" in str(caught.value)
