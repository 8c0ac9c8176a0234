"""Tokens to the first valid tool call: a latency-aware student against an SFT student (same start, same batches).

Both begin as the embedded teacher, whose embedding stays as it is (as in the demo's recipe), and train on demo
conversations whose answers think aloud before they call. Peer: cross-entropy on all of the answer. Ours: the same,
with little weight on the thinking, three in ten calls rendered without it, plus ``early_call``, ``expected_length``
and ``rollout_length``. Held-out requests of known and composed tools, greedy, real model; quantiles are of the
requests of all seeds together. ``ablation`` rows name what each part does alone: a mean over seeds, n held-out
requests behind it. Every student is a cell that is kept in the user's cache
(``mlxkd/tool-latency-cells``), so that a run that was stopped goes on; another teacher, other data or another recipe is
another cell. ``--quick`` is the first seed of the two that are compared, and its cells serve the whole run too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.demo import DEMO_TEACHER, world
from mlxkd.evaluation.speed import time_answers
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import score
from mlxkd.files import file_hash, write_json
from mlxkd.losses.latency.collect import LatencyInputs
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.metric import Metric
from mlxkd.recipe_sections import OnPolicy
from mlxkd.runtime import device_name, versions
from mlxkd.students.freezing import freeze
from mlxkd.students.split import Split
from mlxkd.training.feed import WrittenText, on_student
from mlxkd.training.state import data_hash

METHOD = 4  # to be raised when a change of this file or of a loss changes what a cell would say
ALOUD = (
    "let me think about that.",
    "I look at the tools that I have.",
    "one of them should do that.",
    "I need the values from the message.",
    "now I know what to do.",
    "first I read it again.",
)
SENTENCES = (3, 6)  # of thinking before each call, fewest and most; the call alone takes 23 tokens at the median
SHAPE = (8, 320)
STEPS = 120
HELD = 120  # requests, half of them of composed tools
LONGEST = 160
RATE = 3e-4
FROZEN = ("*embed_tokens*",)  # rows of words that are never a label would only be pushed down
TOLERATED = 1.15  # tokens of a complete answer over those of the expected one


@dataclass(frozen=True)
class Variant:
    """How a student is trained: the loss, how conversations are rendered, the share of batches it writes itself."""

    terms: tuple[Term, ...] = ()
    preamble: float = 1.0
    direct_calls: float = 0.0
    on_policy: float = 0.0

    @property
    def loss(self) -> tuple[Term, ...]:
        return (Term("cross_entropy"), *self.terms)

    @property
    def rendering(self) -> RenderOptions:
        weights = {"preamble": self.preamble} if self.preamble != 1 else {}
        return RenderOptions(weights=weights, direct_calls=self.direct_calls)

    def facts(self) -> dict[str, Any]:
        terms = [[t.name, t.weight, dataclasses.asdict(t.options)] for t in self.terms]
        return {**dataclasses.asdict(dataclasses.replace(self, terms=())), "terms": terms}


EARLY = Term("early_call", 1.0, options={"ramp": 0.25})
LENGTH = Term("expected_length", 0.5)
ROLLOUT = Term("rollout_length", 0.5)
VARIANTS = {
    "sft": Variant(),
    "light_preamble": Variant(preamble=0.05),
    "direct_calls": Variant(direct_calls=0.3),
    "early_call": Variant((EARLY,)),
    "expected_length": Variant((LENGTH,)),
    "rollout_length": Variant((ROLLOUT,), on_policy=0.2),
    "all": Variant((EARLY, LENGTH, ROLLOUT), preamble=0.05, direct_calls=0.3, on_policy=0.2),
}


@dataclass(frozen=True)
class Cell:
    """Held-out answers of one student.

    Args:
        valid: tokens to the first valid call of each request that wants one; None where it never came.
        exact: whether each answer is exact.
        false_calls: whether a call was attempted, of each request that wants none.
        lengths: tokens of each exact answer over those of the expected one.
        seconds: of processor time that the cell took.
    """

    valid: list[int | None]
    exact: list[bool]
    false_calls: list[bool]
    lengths: list[float]
    seconds: float


def measure(quick: bool) -> dict[str, Metric]:
    """Ratios (ours over the peer's), points of exactness lost, over-calling, lengths, one ablation row per variant."""
    seeds, names = (range(1), ("sft", "all")) if quick else (range(3), tuple(VARIANTS))
    cells = {name: [kept(name, seed) for seed in seeds] for name in names}
    sft, ours = cells["sft"], cells["all"]
    count, device = len(sft) * HELD, device_name()
    out = {f"first_call_tokens_ratio_p{int(q * 100)}": _ratio(ours, sft, q) for q in (0.5, 0.95)}
    lost = 100 * (_mean(_share(o.exact) for o in sft) - _mean(_share(o.exact) for o in ours))
    out["exactness_loss_points"] = Metric(lost, "points", "measured", device, count)
    over = 100 * (_mean(_share(o.false_calls) for o in ours) - _mean(_share(o.false_calls) for o in sft))
    out["more_false_calls_points"] = Metric(over, "points", "measured", device, sum(len(o.false_calls) for o in ours))
    lengths = [length for o in ours for length in o.lengths]
    within = _share([length <= TOLERATED for length in lengths]) if lengths else None
    note = f"of exact answers, at most {TOLERATED} times as long as expected" if lengths else "no answer is exact"
    out["short_answers"] = Metric(within, "share", "measured", device, len(lengths), note=note)
    for name, found in cells.items():
        came = [v for o in found for v in o.valid if v is not None]
        never = 1 - len(came) / sum(len(o.valid) for o in found)
        note = f"never {never:.3f}, p95 of the rest {np.quantile(came, 0.95):.0f}, " if came else "no call at all, "
        note += f"exact {_mean(_share(o.exact) for o in found):.3f}, "
        note += f"false calls {_mean(_share(o.false_calls) for o in found):.3f}, "
        note += f"{_mean(o.seconds for o in found):.0f} CPU s a student"
        out[f"ablation_{name}"] = Metric(_tokens(found, 0.5), "tokens", "measured", device, count, note=note)
    return out


def _tokens(cells: list[Cell], q: float) -> float:
    """Quantile of tokens to the first valid call; infinite when it falls on a request without one."""
    values = [v if v is not None else np.inf for cell in cells for v in cell.valid]
    return float(np.quantile(values, q, method="inverted_cdf"))


def _ratio(ours: list[Cell], peer: list[Cell], q: float) -> Metric:
    """Tokens to the first valid call, ours over the peer's; missing where a quantile falls on requests without one."""
    mine, theirs = _tokens(ours, q), _tokens(peer, q)
    count, note = sum(len(cell.valid) for cell in ours), f"{mine:.0f} against {theirs:.0f} tokens"
    if np.isfinite(mine) and np.isfinite(theirs):
        return Metric(mine / theirs, "ratio", "measured", device_name(), count, note=note)
    without = [side for side, tokens in (("ours", mine), ("the peer", theirs)) if not np.isfinite(tokens)]
    note += f": more than {1 - q:.0%} of the requests never got a valid call from {' and '.join(without)}"
    return Metric(None, "ratio", "measured", device_name(), count, note=note)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _share(hits: list[bool]) -> float:
    return float(np.mean(hits)) if hits else float("nan")


def cache_folder() -> Path:
    """Where measured cells live: ``mlxkd/tool-latency-cells`` in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mlxkd" / "tool-latency-cells"


def kept(name: str, seed: int, steps: int = STEPS, held: int = HELD) -> Cell:
    """The cell of a student, measured now or before, with this teacher, data, recipe and MLX."""
    started = time.process_time()
    variant = VARIANTS[name]
    model, tokenizer, _ = compat.load(DEMO_TEACHER)
    examples = [render(r, tokenizer, variant.rendering) for r in _aloud(seed, SHAPE[0] * steps)]
    cases = [case for split in ("known", "composed") for case in _cases(split, held // 2)]
    facts = {
        "variant": variant.facts(),
        "seed": seed,
        "steps": steps,
        "rate": RATE,
        "frozen": FROZEN,
        "teacher": file_hash(DEMO_TEACHER / "model.safetensors"),
        "data": data_hash(examples),
        "cases": hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest(),
        "mlx": versions()["mlx"],
        "version": METHOD,
    }
    path = cache_folder() / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return Cell(**json.loads(path.read_text(encoding="utf-8"))["cell"])
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    _train(model, tokenizer, examples, variant, seed, steps)
    cell = dataclasses.replace(_answers(model, tokenizer, cases), seconds=time.process_time() - started)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"student": {"name": name, **facts}, "cell": dataclasses.asdict(cell)})
    print(f"{name}, seed {seed}: {cell.seconds:.0f} CPU s", file=sys.stderr)
    return cell


def _answers(model: nn.Module, tokenizer: Any, cases: list[dict[str, Any]]) -> Cell:
    parser = parser_for(tokenizer)
    answers = time_answers(model, tokenizer, cases, max_tokens=LONGEST, rows=16)
    scores = [score(c["messages"], c["tools"], text, parser) for c, (_, text) in zip(cases, answers, strict=True)]
    timings = [timing for timing, _ in answers]
    lengths = [
        timing.tokens / _expected_tokens(case, tokenizer)
        for case, timing, found in zip(cases, timings, scores, strict=True)
        if found.exact
    ]
    return Cell(
        [t.ttfa_tokens for t in timings if t.should_call],
        [s.exact for s in scores],
        [s.called for s in scores if not s.should_call],
        lengths,
        0.0,
    )


def _expected_tokens(case: dict[str, Any], tokenizer: Any) -> int:
    """Tokens of the expected answer, its end token included."""
    record = Record("messages", messages=tuple(case["messages"]), tools=tuple(case["tools"]))
    start, end = render(record, tokenizer).meta["turns"][-1]
    return int(end - start)


def _train(model: nn.Module, tokenizer: Any, examples: list[Example], variant: Variant, seed: int, steps: int) -> None:
    freeze(model, FROZEN)
    split = Split(model)
    data = Batches(examples, [SHAPE], seed)
    feed: Batches | WrittenText = data
    if variant.on_policy:
        stop = frozenset(int(token) for token in tokenizer.eos_token_ids)
        wanted = OnPolicy(share=variant.on_policy, max_tokens=LONGEST // 2)
        feed = WrittenText(data, wanted, model, model, stop, seed, steps)
    latency = LatencyInputs(variant.loss, split, tokenizer)
    warm_up = max(1, steps // 10)
    rate = optim.join_schedules([optim.linear_schedule(0.0, RATE, warm_up), optim.cosine_decay(RATE, steps)], [warm_up])
    optimizer = optim.AdamW(rate, weight_decay=0.01)
    for step in range(steps):
        batch = feed.batch(step)
        given = latency(batch, feed.examples) | {"on_student": on_student(batch, feed.examples)}
        weight = float(batch.weights.sum())
        found = loss_and_gradients(model, split, batch, None, variant.loss, weight, progress=step / steps, inputs=given)
        gradients, _ = optim.clip_grad_norm(found.gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def _aloud(seed: int, count: int) -> list[Record]:
    """Demo conversations whose calls come after some sentences of thinking aloud."""
    rng = random.Random(f"aloud:{seed}")
    records = []
    for i, item in enumerate(world.conversations("train", 50_000 + seed, count)):
        messages = [
            {**m, "content": " ".join(rng.sample(ALOUD, rng.randint(*SENTENCES))) + " "} if m.get("tool_calls") else m
            for m in item["messages"]
        ]
        records.append(Record("messages", messages=tuple(messages), tools=tuple(item["tools"]), source=f"aloud:{i}"))
    return records


def _cases(split: world.Set, count: int) -> list[dict[str, Any]]:
    cases = []
    for record in world.conversations(split, 60_000, count):
        first = next(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        cases.append({"messages": record["messages"][: first + 1], "tools": record["tools"]})
    return cases
