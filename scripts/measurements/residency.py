"""Predicted Neural Engine residency of a bundle of our own, by the rule table (no peer predicts it per operation).

A random Llama of 4 layers and width 256, exported with the `ane` profile and palettes; the smallest share of any
function on the strictest chip of the M series. Predicted, never measured: a Mac can plan and measure it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mlxkd.metric import Metric

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 4096,
    "tie_word_embeddings": True, "rope_theta": 10000.0, "max_position_embeddings": 1024,
}  # fmt: skip


def measure(quick: bool) -> dict[str, Metric]:
    """``predicted_ane_share`` of the smallest function on an M1."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ane.convert.export import export
    from ane.convert.options import Options
    from ane.residency.predict import predict
    from mlxkd import compat

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        mx.random.seed(0)
        model = compat.build_model(CONFIG | ({"num_hidden_layers": 1} if quick else {}))
        weights = {key: value.astype(mx.float16) for key, value in tree_flatten(model.parameters())}
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        (folder / "config.json").write_text(json.dumps(CONFIG | ({"num_hidden_layers": 1} if quick else {})))
        export(folder, Path(name) / "bundle", Options(context=512, prefill=64, weights="ane-lut4"))
        return {"predicted_ane_share": predict(Path(name) / "bundle").metric()}
