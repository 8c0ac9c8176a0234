"""Several teachers: weighted everywhere, or each for its own sources of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.errors import UserError


class RoutedTeachers:
    """Asks every teacher, and lets each speak only for the examples routed to it.

    A term names its teacher (``Term(..., teacher="math")``); weighting is the terms' weights.

    Args:
        teachers: by name, each with ``targets(batch)``.
        examples: those that batches refer to by row.
        routes: source prefix -> teacher name; the longest prefix of ``Example.source`` decides. Empty: every
            teacher speaks for every example.

    Raises:
        UserError: a route to a teacher that does not exist.
    """

    def __init__(
        self, teachers: Mapping[str, Any], examples: Sequence[Example], routes: Mapping[str, str] | None = None
    ):
        self.teachers, self.examples, self.routes = dict(teachers), examples, dict(routes or {})
        for prefix, name in self.routes.items():
            if name not in self.teachers:
                raise UserError(
                    f"the route {prefix!r} leads to a teacher {name!r} that is not there",
                    where="teachers.routes",
                    hint=f"teachers: {', '.join(self.teachers)}",
                )

    def check(self) -> None:
        """Find a route for every example, before the first step meets one without.

        Raises:
            UserError: names the source that no route covers.
        """
        for source in {example.source for example in self.examples} if self.routes else ():
            self._route(source)

    def targets(self, batch: Batch) -> dict[str, Any]:
        """Targets by teacher name, with a weight of 0 where the position is another's."""
        said = {name: teacher.targets(batch) for name, teacher in self.teachers.items()}
        if not self.routes:
            return said
        owners = np.array([self._route(self.examples[index].source) for index in batch.rows])
        of_position = owners[batch.supervised // batch.shape[1]]
        return {
            name: dataclasses.replace(targets, weights=_within(of_position == name, targets.weights))
            for name, targets in said.items()
        }

    def _route(self, source: str) -> str:
        fitting = [prefix for prefix in self.routes if source.startswith(prefix)]
        if not fitting:
            raise UserError(
                f"no route for data from {source!r}", where="teachers.routes", hint='"" routes all the rest'
            )
        return self.routes[max(fitting, key=len)]


def _within(mine: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return mine.astype(np.float32) if weights is None else np.where(mine, weights, 0).astype(np.float32)
