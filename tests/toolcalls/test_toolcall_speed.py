"""Timing a real decoder: counts agree with what was generated, phases add up."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.evaluation.clocks import Summary
from mlxkd.evaluation.speed import time_answers

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 700,
    "tie_word_embeddings": True,
}  # fmt: skip


def case(content: str, *calls: dict) -> dict:
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    return {"messages": [{"role": "user", "content": content}, answer], "tools": []}


def test_answers_of_a_random_model_are_timed_and_censored(tmp_path: Path) -> None:
    tokenizer = compat.load_tokenizer(tokenizer_folder(tmp_path, CHATML))
    mx.random.seed(0)
    model = compat.build_model(CONFIG)
    cases = [case("a", {"name": "f", "arguments": {}}), case("bb"), case("ccc", {"name": "f", "arguments": {}})]
    alone = time_answers(model, tokenizer, cases, max_tokens=6)
    together = time_answers(model, tokenizer, cases, max_tokens=6, rows=3)
    assert [text for _, text in alone] == [text for _, text in together]
    for timing, _ in alone:
        assert timing.tokens == len(timing.times) <= 6
        assert 0 < timing.tokenize < timing.prefill < timing.ttft <= timing.times[-1]
        assert list(timing.times) == sorted(timing.times)
    summary = Summary()
    for timing, _ in alone:
        summary.add(timing)
    figures = summary.metrics("test CPU")
    assert (figures["ttfa_tokens"].n, figures["ttfa_tokens"].censored) == (2, 2)
    assert figures["ttft"].n == 3
