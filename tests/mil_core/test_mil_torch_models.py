"""Models that coremltools converted from torch run here and agree with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.mil.package import load

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore")

# What an fp16 package may differ from fp32 torch by, relative to the largest output.
FP16_TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class CNN(nn.Module):
    """Every way a small image network convolves: strided, grouped, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
            nn.GELU(),
            nn.Conv2d(8, 12, 1),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 40),
            nn.SiLU(),
            nn.Linear(40, 5),
        )
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Layer(nn.Module):
    """A pre-norm transformer layer, causal or not. (coremltools 9 cannot convert torch 2.13's own.)"""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.up = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None

    def forward(self, x: Any) -> Any:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.up(x)


class Cache(nn.Module):
    """A running cache and a counter: written by slice, and read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 6, 4))
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Any, position: Any) -> Any:
        at = position.item() if not torch.jit.is_tracing() else position
        self.cache[:, at : at + 1] = x
        self.total[:] = self.total + x[:, 0]
        return self.cache.sum(1) * 2 + self.total


def export(ct: Any, path: Path, module: Any, examples: tuple[Any, ...], **options: Any) -> Path:
    """Trace, convert and save; inputs are called x0, x1, ..."""
    traced = torch.jit.trace(module.eval(), examples, check_trace=False)
    inputs = [
        ct.TensorType(f"x{i}", t.shape, dtype=np.float32 if t.is_floating_point() else np.int32)
        for i, t in enumerate(examples)
    ]
    settings = {"minimum_deployment_target": ct.target.iOS18, "compute_precision": ct.precision.FLOAT32} | options
    model = ct.convert(traced, inputs=inputs, convert_to="mlprogram", skip_model_load=True, **settings)
    model.save(str(path))
    return path


def predicted(path: Path, examples: tuple[Any, ...], **options: Any) -> np.ndarray:
    outputs = load(path).predict({f"x{i}": t.numpy() for i, t in enumerate(examples)}, **options)
    (value,) = outputs.values()
    return value


def image() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 32, 32),)


def ids() -> tuple[Any, ...]:
    return (torch.randint(0, 50, (2, 7), dtype=torch.int32),)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
    "cnn": (CNN, image),
    "encoder": (lambda: nn.Sequential(nn.Embedding(50, 32), Layer(False), Layer(False)), ids),
    "decoder": (lambda: nn.Sequential(nn.Embedding(50, 32), Layer(True), nn.Linear(32, 50)), ids),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_agrees_with_torch(name: str, ct: Any, tmp_path: Path) -> None:
    make, example = MODELS[name]
    module, examples = make().eval(), example()
    expected = module(*examples).detach().numpy()
    path = export(ct, tmp_path / "m.mlpackage", module, examples)
    np.testing.assert_allclose(predicted(path, examples), expected, rtol=1e-4, atol=1e-5)
    # Rounding after every operation is another, coarser computation of the same thing.
    rough = predicted(
        export(ct, tmp_path / "h.mlpackage", module, examples, compute_precision=ct.precision.FLOAT16),
        examples,
        mode="fp16",
    )
    np.testing.assert_allclose(rough, expected, atol=FP16_TOLERANCE * np.abs(expected).max())
    assert np.abs(rough - expected).max() > 1e-6


def test_states_are_kept_between_predictions(ct: Any, tmp_path: Path) -> None:
    module = Cache().eval()
    examples = (torch.randn(1, 1, 4), torch.zeros(1, dtype=torch.int32))
    states = [
        ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)
        for name, shape in (("cache", (1, 6, 4)), ("total", (1, 4)))
    ]
    path = export(ct, tmp_path / "m.mlpackage", module, examples, states=states, compute_precision=ct.precision.FLOAT16)
    function = load(path).function()
    state = function.make_state(unwritten="zero")
    module.cache.zero_()
    module.total.zero_()
    for step in range(4):
        x = torch.randn(1, 1, 4)
        position = torch.tensor([step], dtype=torch.int32)
        expected = module(x, position).numpy()
        (got,) = function.predict({"x0": x.numpy(), "x1": position.numpy()}, state).values()
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(state.read_state("cache"), module.cache.numpy(), rtol=1e-3, atol=1e-4)
    # The program sums the cache without a mask: poisoned slots must show.
    assert np.abs(function.make_state().read_state("cache")).min() == 125
    assert not function.make_state().read_state("total").any()


COMPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "int8": lambda cto, model: cto.linear_quantize_weights(
        model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=100))
    ),
    "int4-block": lambda cto, model: cto.linear_quantize_weights(
        model,
        cto.OptimizationConfig(
            cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=8, weight_threshold=100)
        ),
    ),
    "palette": lambda cto, model: cto.palettize_weights(
        model,
        cto.OptimizationConfig(
            cto.OpPalettizerConfig(
                mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=8, weight_threshold=100
            )
        ),
    ),
    "pruned": lambda cto, model: cto.prune_weights(
        model, cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100))
    ),
}


# Grouped forms begin in iOS18.
@pytest.mark.parametrize(
    ("name", "target"), [("int8", "iOS16"), ("pruned", "iOS16"), *((name, "iOS18") for name in COMPRESSIONS)]
)
def test_a_compressed_model_agrees_with_torch_on_the_same_weights(
    name: str, target: str, ct: Any, tmp_path: Path
) -> None:
    import coremltools.optimize.coreml as cto

    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    examples = (torch.randn(3, 32),)
    path = export(ct, tmp_path / "m.mlpackage", module, examples, minimum_deployment_target=getattr(ct.target, target))
    small = COMPRESSIONS[name](cto, ct.models.MLModel(str(path), skip_model_load=True))
    small.save(str(tmp_path / "c.mlpackage"))
    operations = load(tmp_path / "c.mlpackage").function().operations()
    assert any(op.startswith("constexpr_") for op in operations), operations
    # coremltools itself expands the weights; torch runs with them.
    dense = cto.decompress_weights(ct.models.MLModel(str(tmp_path / "c.mlpackage"), skip_model_load=True))
    weights = [w.val for w in cto.get_weights_metadata(dense, weight_threshold=100).values()]
    for layer, weight in zip((module[0], module[2]), weights, strict=True):
        layer.weight.data = torch.tensor(np.float32(weight))
    expected = module(*examples).detach().numpy()
    np.testing.assert_allclose(predicted(tmp_path / "c.mlpackage", examples), expected, rtol=1e-4, atol=1e-4)


def test_functions_of_one_package_share_their_weights(ct: Any, tmp_path: Path) -> None:
    module = nn.Linear(32, 64).eval()
    short, long = (torch.randn(1, 32),), (torch.randn(5, 32),)
    export(ct, tmp_path / "short.mlpackage", module, short)
    export(ct, tmp_path / "long.mlpackage", module, long)
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("short", "long"):
        description.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    description.default_function_name = "long"
    ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))

    package = load(tmp_path / "both.mlpackage")
    assert (set(package.functions), package.default) == ({"short", "long"}, "long")
    for name, examples in (("short", short), ("long", long)):
        expected = module(*examples).detach().numpy()
        (got,) = package.function(name).predict({"x0": examples[0].numpy()}).values()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert package.weight_bytes()["fp32"] == 4 * (32 * 64 + 64)
