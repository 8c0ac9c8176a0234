"""Telling a person what a conversion does and how long it still takes."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """Says nothing; the base of what does."""

    def start(self, total: int) -> None:
        """Work of ``total`` units (bytes of weights, or tokens) begins."""

    def stage(self, text: str) -> None:
        """What is done now."""

    def advance(self, count: int) -> None:
        """``count`` more units are done."""


class Bar(Progress):
    """A bar on stderr with stage, amount and time left, where stderr is a terminal; a context manager.

    Args:
        unit: "bytes", or the plural of what is counted.
    """

    def __init__(self, unit: str = "bytes") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        amount = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
        self._rich: Any = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = self._rich.add_task("reading", total=None)

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def start(self, total: int) -> None:
        self._rich.update(self._task, total=total)

    def stage(self, text: str) -> None:
        self._rich.update(self._task, description=text)

    def advance(self, count: int) -> None:
        self._rich.advance(self._task, count)
