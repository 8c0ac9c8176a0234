"""A real ``mlx_lm.server`` process for tests of whatever talks to an endpoint."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 120


@contextmanager
def model_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The base URL of a server of ``model`` on a free port; what it prints goes to ``log``.

    Raises:
        AssertionError: it ended or did not answer in time; with its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            base = f"http://127.0.0.1:{port}/v1"
            assert _answers(f"{base}/models", process), f"the server does not answer: {log.read_text()}"
            yield base
        finally:
            process.terminate()
            process.wait(timeout=30)


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return True
        except OSError:
            time.sleep(0.5)
    return False
