"""What a step trains on: data, or what the student or its teacher writes to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import Batch, Batches, build
from mlxkd.data.example import Example, windows
from mlxkd.recipe_sections import OnPolicy
from mlxkd.teachers.onpolicy import Replay, Rollouts, complete, corrected, on_policy_step, prompts_of

Arrays = dict[str, mx.array]


class WrittenText:
    """GKD's mixture: a share of the batches is answered by the student itself, a part of these drawn again later.

    With the teacher as the writer it is sequence-level distillation on samples (Kim and Rush, arXiv 1606.07947).

    The coin, the prompts and the sampling depend on (seed, number of the batch) and the weights alone, so that a
    resumed run writes the same text. Rollouts keep the source of their prompt, which decides who judges them.

    Args:
        batches: the data; a rollout continues a turn of one of its examples.
        options: the recipe's.
        student: as it is now; packed or not.
        teacher: writes, or corrects proposals in the first part of the run, where ``options`` say so.
        stop: ids that end an answer.
        seed: of coin, prompts and sampling.
        total: batches of the whole run.
    """

    def __init__(
        self,
        batches: Batches,
        options: OnPolicy,
        student: nn.Module,
        teacher: nn.Module,
        stop: frozenset[int],
        seed: int,
        total: int,
    ):
        self.data, self.options, self.student, self.teacher = batches, options, student, teacher
        self.rollouts = Rollouts(options.max_tokens, options.temperature, stop)
        self.seed, self.total = seed, total
        self.replay = Replay(options.capacity, options.staleness)
        # The data, followed by the texts of the last batch; always the same list, for whoever looks up sources in it.
        self.examples = list(batches.examples)

    def batch(self, step: int) -> Batch:
        """Batch number ``step``: of the data, freshly written, or replayed."""
        given = self.data.batch(step)
        if not on_policy_step(self.seed, step, self.options.share):
            return given
        rng = np.random.default_rng([self.seed, 5, step])
        texts = self.replay.draw(step, len(given.rows), self.seed) if rng.random() < self.options.replay else []
        texts = [text for text in texts if len(text) <= given.shape[1] + 1]
        if len(texts) < len(given.rows):
            texts = self._written(step, given, rng)
            self.replay.add(step, [_of_then(text) for text in texts])
        count = len(self.data.examples)
        self.examples[count:] = texts
        return build(self.examples, range(count, count + len(texts)), given.shape, self.data.pad)

    def _written(self, step: int, given: Batch, rng: np.random.Generator) -> list[Example]:
        """One answer of the writer to a random turn of every example of a batch."""
        asked = [self.data.examples[row] for row in given.rows]
        choices = [prompts_of(example, self.options.prompt) for example in asked]
        prompts = [turns[rng.integers(len(turns))] for turns in choices]
        was_training = self.student.training
        self.student.eval()
        if self.options.writer == "teacher":
            texts = complete(self.teacher, prompts, self.rollouts, _seed(self.seed, step, 0), source="teacher")
        elif step < math.ceil(self.options.corrected * self.total):
            texts = [
                corrected(
                    self.student, self.teacher, prompt, self.rollouts, _seed(self.seed, step, i), top=self.options.top
                )
                for i, prompt in enumerate(prompts)
            ]
        else:
            texts = complete(self.student, prompts, self.rollouts, _seed(self.seed, step, 0))
        self.student.train(was_training)
        # Where a sample of the student as it is now came from, for losses that weigh it against that turn.
        facts = [
            {"origin": row, "prompt": len(prompt), "budget": self.options.max_tokens} if text.meta["on_student"] else {}
            for row, prompt, text in zip(given.rows, prompts, texts, strict=True)
        ]
        return [
            _cut(text, source.source, given.shape[1], fact)
            for text, source, fact in zip(texts, asked, facts, strict=True)
        ]

    def state(self) -> Arrays:
        """The replay buffer, for a checkpoint."""
        found: Arrays = {}
        for number, (step, example) in enumerate(self.replay.kept):
            facts = {"tokens": example.tokens, "weights": example.weights, "step": np.array(step)}
            facts["on_student"] = np.array(example.meta["on_student"])
            found |= {f"{number}.{name}": mx.array(value) for name, value in facts.items()}
            found[f"{number}.source"] = mx.array(np.frombuffer(example.source.encode(), np.uint8))
        return found

    def restore(self, arrays: Arrays) -> None:
        """Take back what ``state`` gave."""
        self.replay.kept.clear()
        for number in range(len(arrays) // 5):
            tokens, weights, step, own, source = (
                np.array(arrays[f"{number}.{name}"]) for name in ("tokens", "weights", "step", "on_student", "source")
            )
            example = Example(tokens, weights, source=source.tobytes().decode(), meta={"on_student": bool(own)})
            self.replay.kept.append((int(step), example))


def on_student(batch: Batch, examples: Sequence[Example]) -> np.ndarray:
    """bool [N]: which supervised positions of ``batch`` the student wrote; its rows index ``examples``."""
    own = np.array([bool(examples[row].meta.get("on_student")) for row in batch.rows])
    return own[batch.supervised // batch.shape[1]]


def _of_then(text: Example) -> Example:
    """A rollout for the replay buffer: when it is drawn, it is no sample of the student as it is then."""
    return replace(text, meta={"on_student": text.meta["on_student"]})


def _cut(text: Example, source: str, length: int, facts: dict[str, int]) -> Example:
    """A rollout that fits a batch of ``length`` positions, with the source of its prompt."""
    short = windows(text, length)[0] if len(text) > length + 1 else text
    return Example(short.tokens, short.weights, source=source, meta={**text.meta, **facts})


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
