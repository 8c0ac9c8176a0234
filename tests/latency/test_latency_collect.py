"""From rendered conversations to the inputs of the latency losses, with the real grammar of tool calls."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.losses.latency.bits import unpack
from mlxkd.losses.latency.collect import LatencyInputs
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


def _split(size: int) -> Split:
    mx.random.seed(1)
    return Split(compat.build_model({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": size,
        "tie_word_embeddings": True,
    }))  # fmt: skip


def test_a_whole_step_from_conversations(tmp_path: Path) -> None:
    tokenizer = compat.load_tokenizer(tokenizer_folder(tmp_path, COMPACT))
    size = len(tokenizer)
    split = _split(size)
    model = split.model
    examples = [render(r, tokenizer, RenderOptions(weights={"preamble": 0.1})) for r in RECORDS]
    batches = Batches(examples, [(3, 256)])
    batch = batches.batch(0)
    terms = [Term("cross_entropy"), Term("early_call"), Term("expected_length")]
    given = LatencyInputs(terms, split, tokenizer)(batch, batches.examples)
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
    assert LatencyInputs([Term("cross_entropy")], split, tokenizer)(batch, batches.examples) == {}

    # Without schemas the grammar says only that a call should open.
    plain = [Term("cross_entropy"), Term("early_call", options={"schema": False})]
    loose = LatencyInputs(plain, split, tokenizer)(batch, batches.examples)
    assert (loose["early_grammar"] > 0).sum() < (given["early_grammar"] > 0).sum()
    assert np.array_equal(loose["early_prefix"], given["early_prefix"])


def test_each_example_is_held_to_its_own_tools(tmp_path: Path) -> None:
    """The same call under two sets of tools: which arguments there are differs; one automaton is built per set."""
    tokenizer = compat.load_tokenizer(tokenizer_folder(tmp_path, COMPACT))
    function = TOOL["function"]
    city = function["parameters"]["properties"]["city"]
    parameters = {**function["parameters"], "properties": {"city": city, "country": city}}
    other = {"type": "function", "function": {**function, "parameters": parameters}}
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    records = [Record("messages", messages=(ASK, answer), tools=tools) for tools in ((TOOL,), (other,))]
    examples = [render(r, tokenizer) for r in [*records, *records]]
    batches = Batches(examples, [(4, 400)])
    batch = batches.batch(0)
    followed = LatencyInputs([Term("early_call")], _split(len(tokenizer)), tokenizer)
    given = followed(batch, batches.examples)
    choices = np.array(unpack(mx.array(given["early_allowed"]), len(tokenizer))).sum(1)
    widest = {}
    for row, index in enumerate(batch.rows):
        inside = (batch.supervised // batch.shape[1] == row) & (given["early_grammar"] > 0)
        widest[index] = tuple(choices[inside])
    assert widest[0] == widest[2] and widest[1] == widest[3]
    assert sum(widest[1]) > sum(widest[0]), "a second argument leaves more than one way to go on"
