"""A teacher small enough to train against in seconds, with the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxkd import compat
from mlxkd.demo import DEMO_TEACHER

TOY_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 1536,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "teacher"
    mx.random.seed(3)
    compat.save_model_folder(folder, compat.build_model(TOY_CONFIG), TOY_CONFIG, DEMO_TEACHER)
    return folder
