"""From rendered conversations to the inputs of the latency losses, with the real grammar of tool calls."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.losses.latency.bits import unpack
from mlxkd.losses.latency.collect import inputs_for, required_calls
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split

COMPACT = CHATML.replace("arguments | tojson", "arguments | tojson(separators=(',', ':'))")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ASK = {"role": "user", "content": "weather in Oslo"}
RECORDS = [
    Record("messages", messages=(ASK, {"role": "assistant", "content": "Hm. ", "tool_calls": [CALL]}), tools=(TOOL,)),
    Record("messages", messages=(ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}), tools=(TOOL,)),
    Record("messages", messages=(ASK, {"role": "assistant", "content": "I cannot."}), tools=(TOOL,)),
]


def test_a_whole_step_from_conversations(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    tokenizer = compat.load_tokenizer(tokenizer_folder(tmp_path, COMPACT))
    size = len(tokenizer)
    mx.random.seed(1)
    model = compat.build_model({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": size,
        "tie_word_embeddings": True,
    })  # fmt: skip
    examples = [render(r, tokenizer, RenderOptions(weights={"preamble": 0.1})) for r in RECORDS]
    batches = Batches(examples, [(3, 256)])
    batch, split = batches.batch(0), Split(model)
    terms = [Term("cross_entropy"), Term("early_call"), Term("expected_length")]
    given = inputs_for(terms, batch, batches.examples, split, tokenizer, required_calls(tokenizer, size))
    step = loss_and_gradients(model, split, batch, None, terms, progress=1.0, inputs=given)
    assert all(np.isfinite(v.item()) for v in step.sums.values())
    assert step.sums["early_call"].item() > 0 and step.sums["expected_length"].item() > 0

    # Where the teacher's call is followed, the grammar allows what the teacher wrote, and little else.
    allowed = np.array(unpack(mx.array(given["early_allowed"]), size)) > 0
    labels = batch.labels.reshape(-1)[batch.supervised]
    inside = (given["early_grammar"] > 0) & (given["early_label"] == labels)
    assert inside.sum() > 20
    assert allowed[inside, labels[inside]].all()
    assert np.median(allowed[inside].sum(1)) < size / 2
    assert inputs_for([Term("cross_entropy")], batch, batches.examples, split, tokenizer) == {}
