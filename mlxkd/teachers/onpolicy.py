"""Training on what the student itself writes. No gradient ever flows through sampling.

GKD (2306.13649) replaces a share of the batches by student text and keeps the loss over full distributions; SKD
(2410.11325) warms up with proposals that the teacher corrects; a replay buffer of bounded age saves rollouts. A
rollout is an ordinary Example, so that every loss and every teacher serves it unchanged; training on text that a
teacher wrote (sequence-level distillation) is the same with the teacher as the writer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd import compat
from mlxkd.data.example import Example
from mlxkd.errors import UserError


@dataclass(frozen=True)
class Rollouts:
    """How text is sampled.

    Args:
        max_tokens: per completion.
        temperature: of sampling; 0 takes the likeliest token.
        stop: ids that end a completion.
        rows: sequences that decode at once.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    stop: frozenset[int] = frozenset()
    rows: int = 16

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0:
            raise UserError(
                f"max_tokens {self.max_tokens} or temperature {self.temperature} is out of range", where="on_policy"
            )


def prompts_of(example: Example, lead: int = 1) -> list[np.ndarray]:
    """The tokens before each supervised stretch: what the student can be asked to continue, turn by turn.

    Earlier answers and tool results are then context and carry no loss. A plain text (``meta["kind"] == "text"``),
    supervised from its second token on, is continued after its first ``lead`` tokens.
    """
    if example.meta.get("kind") == "text":
        return [example.tokens[: max(1, min(lead, len(example) - 1))]]
    carries = example.weights > 0
    starts = np.flatnonzero(carries & ~np.append(False, carries[:-1]))
    return [example.tokens[:start] for start in starts]


def complete(
    model: nn.Module, prompts: Sequence[np.ndarray], options: Rollouts, seed: int, *, source: str = "rollout"
) -> list[Example]:
    """Continue each prompt; only the continuation carries loss.

    Args:
        model: the writer: the student, or a teacher for sequence-level distillation.
        prompts: int32 token ids, none empty.
        options: sampling.
        seed: equal seeds give equal text on one device.
        source: of the examples; a "rollout" is the student's own.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty: there is nothing to continue", where="on_policy")
    state = [mx.random.key(seed)]

    def sampler(logprobs: mx.array) -> mx.array:
        if options.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        state[0], now = mx.random.split(state[0])
        return mx.random.categorical(logprobs.astype(mx.float32) / options.temperature, key=now)

    written = compat.sample_batch(
        model,
        [prompt.tolist() for prompt in prompts],
        max_tokens=options.max_tokens,
        stop=set(options.stop),
        sampler=sampler,
        rows=options.rows,
    )
    return [_example(prompt, text, source) for prompt, text in zip(prompts, written, strict=True)]


def corrected(
    student: nn.Module, teacher: nn.Module, prompt: np.ndarray, options: Rollouts, seed: int, *, top: int = 25
) -> Example:
    """SKD: the student proposes each token; one outside the teacher's ``top`` is replaced by the teacher's sample."""
    key, caches = mx.random.key(seed), (compat.new_cache(student), compat.new_cache(teacher))
    step, written, replaced = mx.array(prompt[None]), list[int](), 0
    for _ in range(options.max_tokens):
        mine, theirs = (m(step, cache=c)[0, -1] for m, c in zip((student, teacher), caches, strict=True))
        key, first, second = mx.random.split(key, 3)
        token = _draw(mine, options.temperature, first)
        if int(mx.sum(theirs > theirs[token])) >= top:
            token, replaced = _draw(theirs, options.temperature, second), replaced + 1
        written.append(token)
        if token in options.stop:
            break
        step = mx.array([[token]])
    return _example(prompt, written, "corrected", replaced=replaced)


def _draw(logits: mx.array, temperature: float, key: mx.array) -> int:
    if temperature == 0:
        return int(mx.argmax(logits))
    return int(mx.random.categorical(logits.astype(mx.float32) / temperature, key=key))


def _example(prompt: np.ndarray, written: list[int], source: str, **meta: int) -> Example:
    tokens = np.concatenate([prompt, np.array(written, dtype=np.int32)]).astype(np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(prompt) :] = 1
    return Example(tokens, weights, source=source, meta={"on_student": source == "rollout", **meta})


def on_policy_step(seed: int, step: int, share: float) -> bool:
    """GKD's coin: whether this step trains on student text. A function of (seed, step), so that a resume agrees."""
    if not 0 <= share <= 1:
        raise UserError(f"the on-policy share must lie between 0 and 1, not {share}", where="on_policy")
    return bool(np.random.default_rng([seed, 3, step]).random() < share)


@dataclass
class Replay:
    """Rollouts of the last steps.

    Args:
        capacity: examples kept.
        staleness: steps after which an example is dropped, for the student has moved on.
    """

    capacity: int = 1024
    staleness: int = 100
    kept: deque[tuple[int, Example]] = field(default_factory=deque)

    def add(self, step: int, examples: Sequence[Example]) -> None:
        """Keep examples written at ``step``; the oldest leave first."""
        self.kept.extend((step, example) for example in examples)
        while len(self.kept) > self.capacity:
            self.kept.popleft()

    def draw(self, step: int, count: int, seed: int) -> list[Example]:
        """Up to ``count`` different examples that are not stale at ``step``; a function of (contents, seed, step)."""
        while self.kept and step - self.kept[0][0] > self.staleness:
            self.kept.popleft()
        order = np.random.default_rng([seed, 4, step]).permutation(len(self.kept))
        return [self.kept[i][1] for i in order[:count]]
