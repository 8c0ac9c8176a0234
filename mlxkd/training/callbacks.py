"""What watches the loop: a progress bar, a metrics file. The loop knows none of them by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Values = dict[str, Any]


class Callback(Protocol):
    """Told what happened; never changes the run."""

    def on_step(self, step: int, values: Values) -> None:
        """After update ``step`` (counted from 1): loss, loss/<term>, rate, norm, tokens_per_s, peak_bytes."""

    def on_validation(self, step: int, values: Values) -> None:
        """After a validation at ``step``."""


class MetricsFile:
    """One JSON object a line in ``metrics.jsonl``, for plots and for resuming.

    On resume the lines beyond the checkpoint are dropped, because those steps are done again.
    """

    def __init__(self, path: Path, run: str, first_step: int):
        self.path, self.run = path, run
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [v for v in read_metrics(path) if v["run"] != run or v["step"] <= first_step]
        path.write_text("".join(json.dumps(v) + "\n" for v in kept), encoding="utf-8")

    def _write(self, step: int, values: Values) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"run": self.run, "step": step, **values}) + "\n")

    def on_step(self, step: int, values: Values) -> None:
        self._write(step, values)

    def on_validation(self, step: int, values: Values) -> None:
        self._write(step, {f"valid/{name}": value for name, value in values.items()})


def read_metrics(path: Path) -> list[Values]:
    """All whole lines of a metrics file; a torn last line (a killed process) is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class ProgressBar:
    """A bar with loss, tokens per second, memory and time left, on stderr."""

    def __init__(self, title: str, steps: int, first_step: int, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s  {task.fields[memory]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=False)
        self.task = self.progress.add_task(title, total=steps, completed=first_step, loss="–", speed="–", memory="")

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_step(self, step: int, values: Values) -> None:
        self.progress.update(
            self.task,
            completed=step,
            loss=f"{values['loss']:.3f}",
            speed=f"{values['tokens_per_s']:,.0f}",
            memory=f"{values['peak_bytes'] / 2**30:.2f} GB",
        )

    def on_validation(self, step: int, values: Values) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
        self.progress.console.print(f"  step {step}: {shown}", style="dim", highlight=False)
        for reason in values.get("reasons", ()):
            self.progress.console.print(f"  {reason}", style="yellow", highlight=False)
