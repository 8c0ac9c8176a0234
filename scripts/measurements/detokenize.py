"""Streaming text against decoding everything again after each token, on the real model's tokenizer.

Both sides must give the same text; the time of ours includes every piece. mlx-lm's own streaming detokenizer for this
tokenizer stands beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from mlxkd import compat
from mlxkd.decode.detokenize import detokenizer_factory, full_decode
from mlxkd.metric import Metric
from mlxkd.runtime import device_name, versions

DATA = Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def best_of(rounds: int, run: Callable[[], str]) -> tuple[float, str]:
    """Least seconds and the text."""
    times, text = [], ""
    for _ in range(rounds):
        started = time.perf_counter()
        text = run()
        times.append(time.perf_counter() - started)
    return min(times), text


def measure(quick: bool) -> dict[str, Metric]:
    """``speedup`` of streaming over repeated full decoding; times per text."""
    tokenizer = compat.load_tokenizer(DATA / "stories260K")
    story = (DATA / "tinystories" / "stories.txt").read_text(encoding="utf-8")[:20_000]
    tokens = [int(t) for t in tokenizer.encode(story, add_special_tokens=False)][: 512 if quick else 1024]
    make = detokenizer_factory(tokenizer)

    def streaming() -> str:
        detokenizer = make()
        return "".join([detokenizer.add(token) for token in tokens]) + detokenizer.finish()

    def repeated() -> str:
        text = ""
        for end in range(1, len(tokens) + 1):
            text = full_decode(tokenizer, tokens[:end])
        return text

    def mlx_lms() -> str:
        detokenizer = tokenizer.detokenizer
        pieces = []
        for token in tokens:
            detokenizer.add_token(token)
            pieces.append(detokenizer.last_segment)
        detokenizer.finalize()
        return "".join(pieces) + detokenizer.last_segment

    (ours, text), (full, whole), (theirs, _) = (best_of(3, run) for run in (streaming, repeated, mlx_lms))
    if text != whole:
        raise ValueError("the streamed text differs from the full decode")
    device, n = device_name(), len(tokens)
    return {
        "speedup": Metric(full / ours, "ratio", "measured", device, n=n, note="over decoding all tokens at each step"),
        "speedup_over_mlx_lm": Metric(theirs / ours, "ratio", "measured", device, n=n, note=versions()["mlx-lm"]),
        "microseconds_per_token": Metric(ours / n * 1e6, "us", "measured", device, n=n),
    }
