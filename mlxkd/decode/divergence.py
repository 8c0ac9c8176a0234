"""Where a speculative greedy text leaves the plain one, and whether the kernels' rounding can explain it.

Kernels for one query and for several round differently on GPUs and on the Neural Engine, so two tokens whose logits
are nearly tied may swap. How much the kernels differ is measured on the very text: its logits, token by token and in
blocks. A swap needs twice that difference at most, once for either token; a larger margin is a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxkd.decode.readout import on_host
from mlxkd.decode.session import Session


@dataclass(frozen=True)
class Divergence:
    """The first place where two greedy texts differ.

    Args:
        position: index into the answers.
        plain, other: the tokens there.
        margin: logit of ``plain`` minus that of ``other``, from single queries.
        noise: largest difference between the logits of single queries and of blocks on the common text.
    """

    position: int
    plain: int
    other: int
    margin: float
    noise: float

    @property
    def within_noise(self) -> bool:
        """Whether rounding explains it: the margin is at most twice the noise."""
        return self.margin <= 2 * self.noise

    def __str__(self) -> str:
        verdict = "within" if self.within_noise else "beyond"
        return (
            f"first difference at token {self.position}: {self.plain} against {self.other}, logit margin "
            f"{self.margin:.3g}, {verdict} twice the kernels' own difference of {self.noise:.3g}"
        )


def first_divergence(
    session: Session, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int], width: int
) -> Divergence | None:
    """Compare two greedy answers to one prompt; None when they are equal.

    Args:
        session: the worker; its rows are reset.
        prompt: token ids, at least one.
        plain, other: answers token by token, and through drafts.
        width: tokens per call of the speculative run, k + 1.
    """
    common = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if common is None:
        return None
    text = [*prompt, *plain[:common]]
    single, blocks = logits(session, text, 1), logits(session, text, width)
    answers = slice(len(prompt) - 1, None)
    noise = float(np.abs(single[answers] - blocks[answers]).max())
    margin = float(single[-1, plain[common]] - single[-1, other[common]])
    return Divergence(common, plain[common], other[common], margin, noise)


def logits(session: Session, text: Sequence[int], width: int) -> np.ndarray:
    """Logits float64 [len(text), V] of a text fed in blocks of ``width`` tokens through the first row."""
    session.rewind([0] * session.batch_size)
    found = []
    for start in range(0, len(text), width):
        part = text[start : start + width]
        block = np.zeros((session.batch_size, len(part)), dtype=np.int32)
        block[0] = part
        counts = [len(part)] + [0] * (session.batch_size - 1)
        found.append(on_host(session.extend(block, counts), 0, len(part)))
    return np.concatenate(found)
