"""How many tokens to draft: a fixed number, or the one that measured acceptance and costs favour."""

from __future__ import annotations

from collections.abc import Sequence

from mlxkd.decode.speculative import expected_tokens
from mlxkd.errors import UserError

DEFAULT_LENGTHS = (0, 1, 3, 7)
"""With the pending token these are forwards of 1, 2, 4 and 8 tokens."""


class FixedLength:
    """Always the same draft length. Sampled text is then a function of the seed alone."""

    def __init__(self, length: int):
        if length < 0:
            raise UserError(f"a draft length of {length} makes no sense")
        self.length = length

    def choose(self) -> int:
        """See ``DraftLength.choose``."""
        return self.length

    def observe(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Nothing is learnt."""


class AdaptiveLength:
    """Maximises expected tokens per second among the allowed lengths.

    A draft of k brings 1 + the sum of products of the acceptance rates by position, and costs k drafter
    steps and one worker forward of k + 1 tokens; rates and costs are exponential averages of what was
    measured. Every length is tried twice at first (the first time pays for compilation and is not
    counted), and the best untried alternative is looked at again every ``probe_every`` rounds. The law of
    the text never changes, but with sampling the draws depend on timing: fix the length to reproduce them.

    Args:
        lengths: allowed draft lengths; with compiled shapes, one less than each query size.
        memory: weight of a new observation.
        probe_every: rounds between looks at a length that is not the best.

    Raises:
        UserError: no lengths, or a negative one.
    """

    def __init__(self, lengths: Sequence[int] = DEFAULT_LENGTHS, memory: float = 0.1, probe_every: int = 64):
        if not lengths or min(lengths) < 0:
            raise UserError(f"draft lengths {list(lengths)} make no sense")
        self.lengths = tuple(sorted(set(lengths)))
        self._memory, self._probe_every = memory, probe_every
        self._rates = [0.5] * max(1, self.lengths[-1])
        self._verify: dict[int, float] = {}
        self._draft: float | None = None
        self._trials = dict.fromkeys(self.lengths, 0)
        self._rounds = 0

    @classmethod
    def for_queries(cls, query_sizes: Sequence[int] | None, longest: int = 7) -> AdaptiveLength:
        """Lengths that fill the compiled query shapes, up to ``longest``; plain decoding always included."""
        if query_sizes is None:
            return cls(tuple(k for k in DEFAULT_LENGTHS if k <= longest))
        return cls((0, *(size - 1 for size in query_sizes if 1 < size <= longest + 1)))

    @property
    def rates(self) -> tuple[float, ...]:
        """Acceptance by position, given that all before were accepted."""
        return tuple(self._rates)

    def choose(self) -> int:
        """See ``DraftLength.choose``."""
        self._rounds += 1
        fresh = [k for k in reversed(self.lengths) if self._trials[k] < 2]
        if fresh:
            return fresh[0]
        ranked = sorted(self.lengths, key=self.rate, reverse=True)
        probing = len(ranked) > 1 and self._rounds % self._probe_every == 0
        turn = (self._rounds // self._probe_every) % max(1, len(ranked) - 1)
        return ranked[1 + turn] if probing else ranked[0]

    def rate(self, length: int) -> float:
        """Expected tokens per second at a draft length, from what was measured so far."""
        cost = (self._draft or 0.0) * length + self._verify.get(length, 0.0)
        return expected_tokens(self._rates[:length]) / cost if cost > 0 else 0.0

    def observe(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """See ``DraftLength.observe``."""
        for position in range(min(drafted, len(self._rates))):
            if position > accepted:
                break
            outcome = 1.0 if position < accepted else 0.0
            self._rates[position] += self._memory * (outcome - self._rates[position])
        self._trials[asked] += 1
        if self._trials[asked] < 2:
            return
        if drafted == asked:
            known = self._verify.get(drafted, verify_seconds)
            self._verify[drafted] = known + self._memory * (verify_seconds - known)
        else:  # nothing or less was proposed: the round says only that this length is no dearer
            self._verify.setdefault(asked, verify_seconds)
        if drafted:
            each = draft_seconds / drafted
            self._draft = each if self._draft is None else self._draft + self._memory * (each - self._draft)
