"""One side of the conversion measurement, in a process of its own: prints seconds and peak bytes as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

QUERY = 64
CHUNK = 32 << 20  # bytes of weights, of the packages that the streaming side writes


def ours(model: Path, out: Path) -> None:
    """Our exporter, everything it makes by default (prefill and decode, state, checksums)."""
    from ane.convert.export import export
    from ane.convert.options import Options

    export(model, out, Options(context=512, prefill=QUERY))


def streamed(model: Path, out: Path, weights: str = "keep") -> None:
    """Our exporter into packages of at most `CHUNK` bytes, the weights kept or quantised."""
    from ane.convert.export import export
    from ane.convert.options import Options

    export(model, out, Options(context=64, prefill=8, chunk_bytes=CHUNK, weights=weights))


def int8(model: Path, out: Path) -> None:
    """`streamed`, quantised on the way."""
    streamed(model, out, "ane-int8")


def torch(model: Path, out: Path) -> None:
    """transformers, torch.export, coremltools: one stateless function of the same model in float16."""
    import coremltools as ct
    import numpy as np
    import torch
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from transformers import AutoModelForCausalLM

    @register_torch_op(override=True)
    def alias(context, node):  # type: ignore[no-untyped-def]
        # torch.export leaves this identity behind; coremltools 9 has no conversion for it.
        context.add(context[node.inputs[0]], node.name)

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            causal = torch.full((QUERY, QUERY), -1e4).triu(1)[None, None]
            self.register_buffer("mask", causal)
            self.register_buffer("positions", torch.arange(QUERY)[None])

        def forward(self, tokens):  # type: ignore[no-untyped-def]
            # The mask that transformers would build itself holds an operation (diff) that coremltools does not know.
            mask = {"full_attention": self.mask}
            return self.net(input_ids=tokens, attention_mask=mask, position_ids=self.positions, use_cache=False).logits

    tokens = torch.ones((1, QUERY), dtype=torch.int32)
    with torch.no_grad():
        program = torch.export.export(Logits(), (tokens,)).run_decompositions({})
    converted = ct.convert(
        program,
        inputs=[ct.TensorType(name="tokens", shape=(1, QUERY), dtype=np.int32)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    )
    converted.save(str(out / "model.mlpackage"))


def mlx2coreml(model: Path, out: Path) -> None:
    """The other MLX route, by its documented call."""
    import mlx.core as mx
    import mlx2coreml as route

    from mlxkd import compat

    net, _ = compat.load_model(model)
    inputs = {"inputs": mx.ones((1, QUERY), dtype=mx.int32)}
    config = route.ConversionConfig(deployment_target="iOS18", convert_to="mlprogram", compute_precision="fp16")
    route.convert_mlx_to_coreml(net, inputs, config=config).model.save(str(out / "model.mlpackage"))


QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
}
# Layers of 6 MiB, many of them, and hardly a vocabulary: what a conversion that does not stream would hold at once.
DEEP = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
}


def random_model(out: Path, layers: int, shape: dict[str, int]) -> None:
    """A folder with the shape of Qwen3-0.6B, or of ``shape`` where it says so: bfloat16 random weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxkd import compat

    config = {**QWEN, **shape, "num_hidden_layers": layers}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    model = compat.build_model(config)
    weights = {
        name: (0.02 * mx.random.normal(value.shape)).astype(mx.bfloat16)
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "pt"})


def main() -> None:
    """usage: _convert_side.py random|deep OUT LAYERS, or ours|streamed|int8|torch|mlx2coreml MODEL OUT"""
    from mlxkd.runtime import peak_process_memory

    side, first, second = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    started = time.perf_counter()
    if side in ("random", "deep"):
        random_model(first, int(second), DEEP if side == "deep" else {})
    else:
        {each.__name__: each for each in (ours, streamed, int8, torch, mlx2coreml)}[side](first, Path(second))
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": peak_process_memory()}))


if __name__ == "__main__":
    main()
