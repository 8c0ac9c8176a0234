"""Time to the first token on a prompt-cache hit over processing the suffix alone, and the saving over a cold prompt.

Real 260K-parameter model, a prefix of 400 tokens, a suffix of 32. "Suffix alone" is a session that holds the prefix
already and only extends. No peer: mlx-lm's own cache copies whole caches and is told about in the notes.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np

from mlxkd import compat
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.metric import Metric, from_samples
from mlxkd.runtime import device_name

DATA = Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PREFIX, SUFFIX = 400, 32
WARM_UP = 3  # rounds


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds from admission to the first token of an answer that goes on."""
    started = time.perf_counter()
    (row,) = engine.admit(Request(tuple(prompt), GenerateOptions(2, stop_tokens=frozenset())))
    engine.step()
    seconds = time.perf_counter() - started
    engine.step()  # stores the prompt, ends the answer
    assert row not in engine.rows
    return seconds


def suffix_alone(session: MlxSession, prompt: list[int]) -> float:
    """Seconds to extend a session that holds the prefix, and read the first token, through the same steps."""
    session.rewind([PREFIX])
    started = time.perf_counter()
    session.extend(np.array([prompt[PREFIX:-1]], dtype=np.int32))
    session.wait()
    logits = session.extend(np.array([prompt[-1:]], dtype=np.int32))
    np.array(logits).argmax()
    return time.perf_counter() - started


def measure(quick: bool) -> dict[str, Metric]:
    """``ttft_ratio`` of a hit over the suffix alone (medians of alternating runs); the three times beside it."""
    net, tokenizer, config = compat.load(DATA / "stories260K")
    rng = np.random.default_rng(0)
    prefix = [1, *rng.integers(3, 512, PREFIX - 1).tolist()]
    cache = PromptCache(1 << 28)
    warm = Engine(MlxSession(net, config), tokenizer, cache=cache.for_model("m"))
    cold = Engine(MlxSession(net, config), tokenizer)
    held = MlxSession(net, config)
    held.extend(np.array([prefix], dtype=np.int32))
    held.wait()
    first_token(warm, [*prefix, 5])
    times: dict[str, list[float]] = {"hit": [], "suffix": [], "cold": []}
    for round_number in range(WARM_UP + (12 if quick else 60)):
        prompt = [*prefix, *rng.integers(3, 512, SUFFIX).tolist()]
        sides = [
            ("hit", lambda p=prompt: first_token(warm, p)),
            ("suffix", lambda p=prompt: suffix_alone(held, p)),
            ("cold", lambda p=prompt: first_token(cold, p)),
        ]
        orders = list(itertools.permutations(sides))  # each side follows each other one: what ran before costs
        for name, side in orders[round_number % len(orders)]:
            seconds = side()
            if round_number >= WARM_UP:
                times[name].append(seconds)
    device, middle = device_name(), {name: float(np.median(values)) for name, values in times.items()}
    n, note = len(times["hit"]), f"{PREFIX} tokens cached, {SUFFIX} new"
    ratio, saving = middle["hit"] / middle["suffix"], middle["cold"] - middle["hit"]
    return {
        "ttft_ratio": Metric(ratio, "ratio", "measured", device, n=n, note=note),
        "saving_over_cold": Metric(saving * 1e3, "ms", "measured", device, n=n, note=note),
        **{
            f"ttft_{name}": from_samples([v * 1e3 for v in values], "ms", method="measured", device=device)
            for name, values in times.items()
        },
    }
