"""Decoding speed of the reference runtime against MLX: the same llama-shaped fp16 decoder, on this machine.

Peer: the same weights in mlx-lm's llama with its own key/value cache, on MLX's default device, tried in fp16 and in
fp32; the ratio is to the faster of the two. Both sides decode the same tokens alternately, one token per step, in
one process; their logits are compared first. Full size: 110M parameters (12 layers, width 768, vocabulary 32,000),
context 256. Random weights: speed does not depend on their values.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkd import compat, runtime
from mlxkd.metric import Metric, from_samples

if TYPE_CHECKING:
    from ane.mil.package import Function

FULL = {"layers": 12, "width": 768, "hidden": 2048, "heads": 12, "kv_heads": 4, "vocab": 32000, "context": 256}
QUICK = {"layers": 4, "width": 256, "hidden": 704, "heads": 4, "kv_heads": 2, "vocab": 4096, "context": 64}
TOKENS = 24
# Far below any activation and exact in fp16.
MASKED = -40000.0


def measure(quick: bool) -> dict[str, Metric]:
    """tokens_per_s_ratio (ours over the faster MLX dtype), both speeds, and where our time goes."""
    runtime.preload_blas()
    size = QUICK if quick else FULL
    tokens = TOKENS // 3 if quick else TOKENS
    peers = {dtype: _Peer(size, dtype) for dtype in ("float16", "float32")}
    with tempfile.TemporaryDirectory() as folder:
        path = build(peers["float16"].model, size, Path(folder) / "decoder.mlpackage")
        ours = Ours(path, size)
        agreement = _agreement(ours, peers["float32"], size)
        steps: dict[str, list[float]] = {"ours": [], **{dtype: [] for dtype in peers}}
        for step in range(tokens):
            token = (step * 7919) % size["vocab"]
            for name, side in {"ours": ours, **peers}.items():
                start = time.perf_counter()
                side.step(token)
                steps[name].append(time.perf_counter() - start)
        shares = ours.profile()
    return _metrics(steps, agreement, shares, size)


def _metrics(
    steps: dict[str, list[float]], agreement: float, shares: dict[str, float], size: dict[str, int]
) -> dict[str, Metric]:
    device = runtime.device_name()
    note = f"{size['layers']} layers, width {size['width']}; largest logit difference {agreement:.1e} of the range"
    speeds = {
        name: from_samples([1 / s for s in seconds[2:]], "tokens/s", method="measured", device=device)
        for name, seconds in steps.items()
    }
    best = max(speeds["float16"].value or 0.0, speeds["float32"].value or 0.0)
    ratio = (speeds["ours"].value or 0.0) / best
    return {
        "tokens_per_s_ratio": Metric(ratio, "ratio", "measured", device, speeds["ours"].n, note=note),
        "tokens_per_s_mil": speeds["ours"],
        "tokens_per_s_mlx_fp16": speeds["float16"],
        "tokens_per_s_mlx_fp32": speeds["float32"],
        **{f"share_{op}": Metric(share, "share", "measured", device) for op, share in shares.items()},
    }


def _agreement(ours: Ours, peer: _Peer, size: dict[str, int]) -> float:
    """Largest difference of logits over three tokens, relative to their range; both sides start anew after it."""
    worst = 0.0
    for token in (1, 5, 9):
        a, b = ours.step(token), peer.step(token)
        worst = max(worst, float(np.abs(a - b).max() / np.ptp(b)))
    if worst > 0.02:
        raise AssertionError(f"the two sides compute different models: {worst}")
    ours.restart()
    peer.restart()
    return worst


class _Peer:
    """mlx-lm's llama, one token at a time."""

    def __init__(self, size: dict[str, int], dtype: str):
        import mlx.core as mx
        import mlx.nn as nn

        mx.random.seed(0)
        self.model: Any = compat.build_model(
            {
                "model_type": "llama",
                "hidden_size": size["width"],
                "intermediate_size": size["hidden"],
                "num_hidden_layers": size["layers"],
                "num_attention_heads": size["heads"],
                "num_key_value_heads": size["kv_heads"],
                "vocab_size": size["vocab"],
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
            }
        )
        assert isinstance(self.model, nn.Module)
        self.model.set_dtype(mx.float16)
        self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        self.restart()

    def restart(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model)

    def step(self, token: int) -> np.ndarray:
        import mlx.core as mx

        logits = self.model(mx.array([[token]]), cache=self.cache)[0, -1].astype(mx.float32)
        mx.eval(logits)
        return np.array(logits)


class Ours:
    """The saved package in the reference runtime, with rotary angles and mask made on the host."""

    def __init__(self, path: Path, size: dict[str, int]):
        import ane.mil

        self.size = size
        self.function: Function = ane.mil.load(path).function()
        self.restart()

    def restart(self) -> None:
        self.state, self.position = self.function.make_state(), 0

    def inputs(self, token: int) -> dict[str, np.ndarray]:
        width = self.size["width"] // self.size["heads"]
        angles = self.position * 10000.0 ** (-np.arange(0, width, 2) / width)
        mask = np.where(np.arange(self.size["context"]) <= self.position, 0, MASKED)
        return {
            "tokens": np.array([[token]], np.int32),
            "position": np.array([self.position], np.int32),
            "cos": np.tile(np.cos(angles), 2).reshape(1, 1, width, 1).astype(np.float16),
            "sin": np.tile(np.sin(angles), 2).reshape(1, 1, width, 1).astype(np.float16),
            "mask": mask.reshape(1, 1, 1, -1).astype(np.float16),
        }

    def step(self, token: int) -> np.ndarray:
        outputs = self.function.predict(self.inputs(token), self.state)
        self.position += 1
        return outputs["logits"].reshape(-1).astype(np.float32)

    def profile(self, tokens: int = 4) -> dict[str, float]:
        """Share of the time of each operation that takes at least 2 %."""
        seconds = self.function.profile([self.inputs(3)] * tokens, self.state)
        return {op: s / sum(seconds.values()) for op, s in seconds.items() if s >= 0.02 * sum(seconds.values())}


def build(model: Any, size: dict[str, int], path: Path) -> Path:
    """Save ``model`` (mlx-lm llama) as a one-token stateful decoder in the layout of the Neural Engine."""
    ct = runtime.import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    head = size["width"] // size["heads"]
    cache = (size["layers"] * size["kv_heads"], size["context"], head)
    specs = [
        mb.TensorSpec((1, 1), types.int32),
        mb.TensorSpec((1,), types.int32),
        mb.TensorSpec((1, 1, head, 1), types.fp16),
        mb.TensorSpec((1, 1, head, 1), types.fp16),
        mb.TensorSpec((1, 1, 1, size["context"]), types.fp16),
        mb.StateTensorSpec((1, *cache), types.fp16),
        mb.StateTensorSpec((1, *cache), types.fp16),
    ]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(tokens, position, cos, sin, mask, keys, values):  # type: ignore[no-untyped-def]
        layers = _Layers(mb, model, size, (position, cos, sin, mask, keys, values))
        x = mb.gather(x=layers.array(model.model.embed_tokens.weight), indices=tokens, axis=0, validate_indices=False)
        x = mb.expand_dims(x=mb.transpose(x=x, perm=[0, 2, 1]), axes=[2])
        for index, layer in enumerate(model.model.layers):
            x = layers.layer(x, layer, index)
        x = layers.norm(x, model.model.norm)
        return layers.conv(x, model.model.embed_tokens, name="logits")

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({"common::guard_negative_gather_indices", "common::add_int16_cast"})
    ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=pipeline,
        skip_model_load=True,
    ).save(str(path))
    return path


class _Layers:
    """Writes llama's layers with coremltools' builder."""

    def __init__(self, mb: Any, model: Any, size: dict[str, int], shared: tuple[Any, ...]):
        self.mb, self.size = mb, size
        self.position, self.cos, self.sin, self.mask, self.keys, self.values = shared
        self.head = size["width"] // size["heads"]
        # Each layer updates what the one before it left: coremltools merges repeated reads of one state.
        self.current = {state: mb.read_state(input=state) for state in (self.keys, self.values)}

    @staticmethod
    def array(value: Any) -> np.ndarray:
        return np.array(value, dtype=np.float16)

    def conv(self, x: Any, module: Any, **options: str) -> Any:
        weight = self.array(module.weight)
        return self.mb.conv(x=x, weight=weight.reshape(*weight.shape, 1, 1), pad_type="valid", **options)

    def norm(self, x: Any, module: Any) -> Any:
        """RMSNorm as the layer norm of [x, -x], whose mean is zero."""
        both = self.mb.concat(values=[x, self.mb.mul(x=x, y=np.float16(-1))], axis=1)
        both = self.mb.layer_norm(x=both, axes=[1], epsilon=np.float16(1e-5))
        half = self.mb.slice_by_size(x=both, begin=[0] * 4, size=[1, self.size["width"], 1, 1])
        return self.mb.mul(x=half, y=self.array(module.weight).reshape(1, -1, 1, 1))

    def rotate(self, x: Any) -> Any:
        first, second = self.mb.split(x=x, num_splits=2, axis=2)
        turned = self.mb.concat(values=[self.mb.mul(x=second, y=np.float16(-1)), first], axis=2)
        return self.mb.add(x=self.mb.mul(x=x, y=self.cos), y=self.mb.mul(x=turned, y=self.sin))

    def heads(self, x: Any, count: int) -> Any:
        return self.mb.reshape(x=x, shape=[1, count, self.head, 1])

    def remember(self, state: Any, value: Any, index: int) -> Any:
        """Write one position of this layer's heads, and return all of its positions [1, kv, context, head]."""
        mb, kv = self.mb, self.size["kv_heads"]
        one = mb.transpose(x=value, perm=[0, 1, 3, 2])
        first, last, zero = np.array([0, index * kv], np.int32), np.array([1, (index + 1) * kv], np.int32), np.int32(0)
        begin = mb.concat(values=[first, self.position, [zero]], axis=0)
        end = mb.concat(values=[last, mb.add(x=self.position, y=np.int32(1)), [np.int32(self.head)]], axis=0)
        new = mb.slice_update(x=self.current[state], update=one, begin=begin, end=end)
        full = self.current[state] = mb.coreml_update_state(state=state, value=new)
        return mb.slice_by_size(x=full, begin=[0, index * kv, 0, 0], size=[1, kv, self.size["context"], self.head])

    def layer(self, x: Any, layer: Any, index: int) -> Any:
        mb, kv = self.mb, self.size["kv_heads"]
        y, attention = self.norm(x, layer.input_layernorm), layer.self_attn
        q = self.rotate(self.heads(self.conv(y, attention.q_proj), self.size["heads"]))
        k = self.rotate(self.heads(self.conv(y, attention.k_proj), kv))
        v = self.heads(self.conv(y, attention.v_proj), kv)
        keys, values = self.remember(self.keys, k, index), self.remember(self.values, v, index)
        # Query heads of one key/value head sit side by side: [1, kv, group, head].
        q = mb.reshape(x=q, shape=[1, kv, self.size["heads"] // kv, self.head])
        scores = mb.matmul(x=mb.mul(x=q, y=np.float16(self.head**-0.5)), y=keys, transpose_y=True)
        weights = mb.softmax(x=mb.add(x=scores, y=self.mask), axis=-1)
        mixed = mb.reshape(x=mb.matmul(x=weights, y=values), shape=[1, self.size["width"], 1, 1])
        x = mb.add(x=x, y=self.conv(mixed, attention.o_proj))
        y, mlp = self.norm(x, layer.post_attention_layernorm), layer.mlp
        gated = mb.mul(x=mb.silu(x=self.conv(y, mlp.gate_proj)), y=self.conv(y, mlp.up_proj))
        return mb.add(x=x, y=self.conv(gated, mlp.down_proj))
