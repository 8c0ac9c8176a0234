"""Tokens to the first valid tool call: a latency-aware student against an SFT student (same start, same batches).

Both begin as the embedded teacher and train on demo conversations whose answers think aloud before they call. Peer:
cross-entropy on all of the answer. Ours: the same, with little weight on the thinking, three in ten calls rendered
without it, plus ``early_call`` and ``expected_length``. Held-out requests of known and composed tools, greedy, real
model. ``ablation`` rows name what each part does alone: a mean over seeds, n held-out requests behind it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.demo import DEMO_TEACHER, world
from mlxkd.evaluation.clocks import Timing
from mlxkd.evaluation.speed import time_answers
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import CallScore, score
from mlxkd.losses.latency.collect import LatencyInputs
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.metric import Metric
from mlxkd.runtime import device_name
from mlxkd.students.split import Split

ALOUD = (
    "let me think about that.",
    "I look at the tools that I have.",
    "one of them should do that.",
    "I need the values from the message.",
    "now I know what to do.",
    "first I read it again.",
)
CE = Term("cross_entropy")
EARLY = Term("early_call", 1.0, options={"ramp": 0.25})
LENGTH = Term("expected_length", 0.5)
PLAIN, LIGHT = RenderOptions(), RenderOptions(weights={"preamble": 0.05})
DIRECT = RenderOptions(direct_calls=0.3)
VARIANTS: dict[str, tuple[tuple[Term, ...], RenderOptions]] = {
    "sft": ((CE,), PLAIN),
    "light_preamble": ((CE,), LIGHT),
    "direct_calls": ((CE,), DIRECT),
    "early_call": ((CE, EARLY), PLAIN),
    "expected_length": ((CE, LENGTH), PLAIN),
    "all": ((CE, EARLY, LENGTH), RenderOptions(weights={"preamble": 0.05}, direct_calls=0.3)),
}


@dataclass(frozen=True)
class Outcome:
    """Held-out answers of one student."""

    timings: list[Timing]
    scores: list[CallScore]

    def tokens(self, q: float) -> float:
        """Quantile of tokens to the first valid call; infinite when it falls on a request without one."""
        values = [t.ttfa_tokens if t.ttfa_tokens is not None else np.inf for t in self.timings if t.should_call]
        return float(np.quantile(values, q, method="inverted_cdf"))

    @property
    def exact(self) -> float:
        return float(np.mean([s.exact for s in self.scores]))

    @property
    def false_calls(self) -> float:
        return float(np.mean([s.called for s in self.scores if not s.should_call] or [np.nan]))


def measure(quick: bool) -> dict[str, Metric]:
    """Ratios (ours over the peer's), points of exactness lost, and one ablation row per variant."""
    seeds, steps, held = (range(1), 40, 48) if quick else (range(3), 100, 200)
    outcomes = {name: [_student(name, seed, steps, held) for seed in seeds] for name in VARIANTS}
    sft, ours = outcomes["sft"], outcomes["all"]
    count = len(sft) * held
    out = {
        f"first_call_tokens_ratio_p{int(q * 100)}": Metric(
            _mean([o.tokens(q) for o in ours]) / _mean([o.tokens(q) for o in sft]),
            "ratio",
            "measured",
            device_name(),
            count,
        )
        for q in (0.5, 0.95)
    }
    lost = 100 * (_mean([o.exact for o in sft]) - _mean([o.exact for o in ours]))
    out["exactness_loss_points"] = Metric(lost, "points", "measured", device_name(), count)
    for name, found in outcomes.items():
        note = f"p95 {_mean([o.tokens(0.95) for o in found]):.1f}, exact {_mean([o.exact for o in found]):.3f}, "
        note += f"false calls {_mean([o.false_calls for o in found]):.3f}"
        value = _mean([o.tokens(0.5) for o in found])
        out[f"ablation_{name}"] = Metric(value, "tokens", "measured", device_name(), count, note=note)
    return out


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _student(name: str, seed: int, steps: int, held: int) -> Outcome:
    terms, options = VARIANTS[name]
    model, tokenizer, _ = compat.load(DEMO_TEACHER)
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    examples = [render(r, tokenizer, options) for r in _aloud(seed, 8 * steps)]
    batches = Batches(examples, [(8, 320)], seed)
    _train(model, tokenizer, batches, terms, steps)
    cases = [case for split in ("known", "composed") for case in _cases(split, held // 2)]
    answers = time_answers(model, tokenizer, cases, max_tokens=160, rows=16)
    parser = parser_for(tokenizer)
    scores = [score(c["messages"], c["tools"], text, parser) for c, (_, text) in zip(cases, answers, strict=True)]
    return Outcome([timing for timing, _ in answers], scores)


def _train(model: nn.Module, tokenizer: Any, batches: Batches, terms: tuple[Term, ...], steps: int) -> None:
    split = Split(model)
    latency = LatencyInputs(terms, split, tokenizer)
    rate = optim.join_schedules(
        [optim.linear_schedule(0.0, 3e-4, max(1, steps // 10)), optim.cosine_decay(3e-4, steps)], [max(1, steps // 10)]
    )
    optimizer = optim.AdamW(rate, weight_decay=0.01)
    for step in range(steps):
        batch = batches.batch(step)
        given = latency(batch, batches.examples)
        progress = step / steps
        found = loss_and_gradients(
            model, split, batch, None, terms, float(batch.weights.sum()), progress=progress, inputs=given
        )
        gradients, _ = optim.clip_grad_norm(found.gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def _aloud(seed: int, count: int) -> list[Record]:
    """Demo conversations whose calls come after one to four sentences of thinking aloud."""
    rng = random.Random(f"aloud:{seed}")
    records = []
    for i, item in enumerate(world.conversations("train", 50_000 + seed, count)):
        messages = [
            {**m, "content": " ".join(rng.sample(ALOUD, rng.randint(1, 4))) + " "} if m.get("tool_calls") else m
            for m in item["messages"]
        ]
        records.append(Record("messages", messages=tuple(messages), tools=tuple(item["tools"]), source=f"aloud:{i}"))
    return records


def _cases(split: str, count: int) -> list[dict[str, Any]]:
    cases = []
    for record in world.conversations(split, 60_000, count):
        first = next(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        cases.append({"messages": record["messages"][: first + 1], "tools": record["tools"]})
    return cases
