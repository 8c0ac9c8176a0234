"""Energy of a stretch of work, from macmon (https://github.com/vladkens/macmon): no root needed, macOS only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from ane.residency.signals import PowerSample, energy, parse_macmon
from mlxkd.errors import UserError

INTERVAL = 0.5
IDLE_SECONDS = 3.0
MISSING = "not available here: needs macOS and macmon"


class PowerMeter:
    """Records system power inside a ``with`` block, after an idle window that is taken off.

    Without macmon nothing is recorded and ``joules`` says what is needed.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS):
        self.idle_seconds = idle_seconds
        self._tool = shutil.which("macmon")
        self._idle: list[PowerSample] = []
        self._work: list[PowerSample] = []

    def __enter__(self) -> PowerMeter:
        if self._tool:
            self._start()
            time.sleep(self.idle_seconds)
            self._idle = self._stop()
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._tool:
            self._work = self._stop()

    def _start(self) -> None:
        handle, name = tempfile.mkstemp(suffix=".jsonl")
        self._file = Path(name)
        command = [str(self._tool), "pipe", "-i", str(round(INTERVAL * 1000))]
        self._process = subprocess.Popen(command, stdout=handle, stderr=subprocess.DEVNULL)
        os.close(handle)

    def _stop(self) -> list[PowerSample]:
        self._process.terminate()
        self._process.wait(timeout=10)
        text = self._file.read_text(encoding="utf-8", errors="replace")
        self._file.unlink()
        try:
            return parse_macmon(text, interval=INTERVAL)
        except UserError:
            return []  # too short for a single sample: energy() says so

    def joules(self) -> tuple[float | None, str]:
        """System energy of the block above idle in joules, or None with the reason."""
        if not self._tool:
            return None, MISSING
        return energy(self._work, self._idle, "system")
