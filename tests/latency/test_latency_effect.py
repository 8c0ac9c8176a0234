"""What the losses are for, on a task small enough to learn in seconds: call at once, call right, do not over-call."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.losses.latency import inputs
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split

# Requests "ask KEY" want OPEN KEY CLOSE; "chat KEY" wants REFUSE. The teacher recites a phrase before each call.
START, ASSISTANT, END, OPEN, CLOSE, REFUSE, ASK, CHAT = range(1, 9)
KEYS, PHRASE = list(range(9, 17)), list(range(17, 25))
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
CE = Term("cross_entropy")
EARLY, LENGTH = Term("early_call", 5.0, options={"ramp": 0.2}), Term("expected_length", 5.0)


def conversation(random: np.random.Generator, preamble_weight: float, direct: float) -> Example:
    key, wants = int(random.choice(KEYS)), random.random() < 0.7
    prompt = [START, ASK if wants else CHAT, key, ASSISTANT]
    phrase = PHRASE[: int(random.integers(5, 9))] if wants and random.random() >= direct else []
    answer = [*phrase, OPEN, key, CLOSE, END] if wants else [REFUSE, END]
    weights = np.zeros(len(prompt) + len(answer), np.float32)
    weights[len(prompt) :] = 1
    weights[len(prompt) : len(prompt) + len(phrase)] = preamble_weight
    at = len(prompt) + len(phrase)
    meta = {
        "turns": [(len(prompt), len(weights))],
        "calls": [(at, at + 3) if wants else None],
        "tools": ({},),
        "should_call": wants,
    }
    return Example(np.array(prompt + answer, np.int32), weights, meta=meta)


def student(terms: list[Term], preamble_weight: float, direct: float, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    model = compat.build_model(CONFIG)
    mx.eval(model.parameters())
    random = np.random.default_rng(seed)
    batches = Batches([conversation(random, preamble_weight, direct) for _ in range(512)], [(32, 15)])
    split, optimizer, steps = Split(model), optim.AdamW(5e-3), 120
    names = {term.name for term in terms}
    for step in range(steps):
        batch = batches.batch(step)
        given: inputs.Inputs = {}
        if "early_call" in names:
            given |= inputs.early_call(batch, batches.examples, [OPEN], 32)
        if "expected_length" in names:
            given |= inputs.expected_length(batch, batches.examples, split, [OPEN])
        weight = float(batch.weights.sum())
        found = loss_and_gradients(model, split, batch, None, terms, weight, progress=step / steps, inputs=given)
        optimizer.update(model, optim.clip_grad_norm(found.gradients, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
    return model


def answers(model: nn.Module, kind: int) -> list[list[int]]:
    """Greedy answers to every key."""
    tokens = np.array([[START, kind, key, ASSISTANT] for key in KEYS], np.int32)
    for _ in range(13):
        following = np.array(mx.argmax(model(mx.array(tokens))[:, -1], axis=-1)).astype(np.int32)
        tokens = np.concatenate([tokens, following[:, None]], axis=1)
    return [row[4:].tolist() for row in tokens]


def judge(model: nn.Module) -> tuple[float, float, float]:
    """Median tokens to a right call (infinite without), share of right calls, share of calls where none belongs."""
    wanted = list(zip(KEYS, answers(model, ASK), strict=True))
    right = [_first_call(answer) == key for key, answer in wanted]
    first = [answer.index(CLOSE) + 1 if ok else np.inf for ok, (_, answer) in zip(right, wanted, strict=True)]
    over = [OPEN in answer[: [*answer, END].index(END)] for answer in answers(model, CHAT)]
    return float(np.quantile(first, 0.5, method="inverted_cdf")), float(np.mean(right)), float(np.mean(over))


def _first_call(answer: list[int]) -> int | None:
    if OPEN not in answer[:-2]:
        return None
    at = answer.index(OPEN)
    return answer[at + 1] if answer[at + 2] == CLOSE else None


def test_a_latency_aware_student_calls_at_once_and_does_not_over_call() -> None:
    tokens, right, over = judge(student([CE], 1.0, 0.0))
    assert tokens >= 8 and over == 0, "plain fine-tuning learns to hesitate"
    aware, aware_right, aware_over = judge(student([CE, EARLY, LENGTH], 0.05, 0.3))
    assert aware <= tokens / 2
    assert aware_right >= right and aware_over == 0
