"""Batch 4 over batch 1 throughput of a queue, ours over mlx-lm's BatchGenerator, same model, alternating.

Real 260K-parameter model, ragged prompts and answer lengths, greedy. The peer is the installed mlx-lm. Each side
counts by its fastest run: what else the machine does can only slow a run, and does so for seconds at a time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from mlxkd import compat
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.policy import measure_queue
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.metric import Metric
from mlxkd.runtime import device_name, versions

DATA = Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def add_arguments(parser) -> None:
    """The model to measure."""
    parser.add_argument("--model", type=Path, default=DATA / "stories260K")


def queue(count: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """Ragged prompts of 8 to 40 tokens and answers of 24 to 56; nothing ends early."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        prompt = (1, *rng.integers(3, vocabulary, int(rng.integers(8, 40))).tolist())
        options = GenerateOptions(int(rng.integers(24, 56)), stop_tokens=frozenset())
        found.append(Request(prompt, options, str(i)))
    return found


def mlx_lm_throughput(model, requests: list[Request], batch: int) -> float:
    """New tokens per second of the same queue through mlx-lm."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, completion_batch_size=batch, prefill_batch_size=batch)
    started = time.perf_counter()
    generator.insert([list(r.prompt) for r in requests], [r.options.max_tokens for r in requests])
    tokens = 0
    while responses := generator.next_generated():
        tokens += len(responses)
    seconds = time.perf_counter() - started
    generator.close()
    assert tokens == sum(r.options.max_tokens for r in requests)
    return tokens / seconds


def measure(quick: bool, model: Path = DATA / "stories260K") -> dict[str, Metric]:
    """``ratio_over_mlx_lm`` of the two batch-4-over-1 ratios; the four throughputs beside it (fastest runs)."""
    net, tokenizer, config = compat.load(model)
    engines = {batch: Engine(MlxSession(net, config, batch_size=batch), tokenizer) for batch in (1, 4)}
    requests = queue(8, engines[1].session.vocab_size)
    runs: dict[str, list[float]] = {"ours_1": [], "ours_4": [], "mlx_lm_1": [], "mlx_lm_4": []}
    for round_number in range(5 if quick else 21):
        for batch in (1, 4):
            ours, theirs = measure_queue(engines[batch], requests).throughput, mlx_lm_throughput(net, requests, batch)
            if round_number:  # the first round warms up
                runs[f"ours_{batch}"].append(ours)
                runs[f"mlx_lm_{batch}"].append(theirs)
    best = {name: max(values) for name, values in runs.items()}
    ratio = (best["ours_4"] / best["ours_1"]) / (best["mlx_lm_4"] / best["mlx_lm_1"])
    count = len(runs["ours_1"])
    note = f"{model.name}, {len(requests)} requests, against mlx-lm {versions()['mlx-lm']}"
    device = device_name()
    found = {"ratio_over_mlx_lm": Metric(ratio, "ratio", "measured", device, n=count, note=note)}
    for name, value in best.items():
        found[f"throughput_{name}"] = Metric(value, "tokens/s", "measured", device, n=count)
    return found
