"""Telling a person what a conversion does and how long it still takes."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Says nothing; the base of what does."""

    def start(self, total: int) -> None:
        """A conversion of ``total`` weight bytes begins."""

    def stage(self, text: str) -> None:
        """What is done now."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are written."""


class Bar(Progress):
    """A bar on stderr with stage, bytes and time left; a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich: Any = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def start(self, total: int) -> None:
        self._task = self._rich.add_task("reading", total=total)

    def stage(self, text: str) -> None:
        self._rich.update(self._task, description=text)

    def advance(self, count: int) -> None:
        self._rich.advance(self._task, count)
