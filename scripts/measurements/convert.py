"""Converting a model of Qwen3-0.6B's shape: ours against the torch route (transformers, torch.export, coremltools).

Random bfloat16 weights. Each side runs alternately in a process of its own, imports included, from the same folder.
Ours writes the default bundle (prefill and decode functions, state, embedding, checksums); the peer writes one
stateless function of 64 tokens, which is less. mlx2coreml is tried on the same folder where it is installed.

Streaming is measured by itself: a deep narrow model in packages of 32 MiB, its peak less that of one layer's conversion
(imports and all that does not grow with a model), over the largest package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ane.convert.bundle import read_manifest
from mlxkd.errors import UserError
from mlxkd.metric import Metric
from mlxkd.runtime import device_name, versions

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("_convert_side.py")


def run(*arguments: str) -> dict[str, float]:
    """One side in a fresh process.

    Raises:
        UserError: it failed; with the error that it ended in.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(SIDE), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{arguments[0]} failed: {ended_in(done.stderr)}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ended_in(said: str) -> str:
    """The exception at the end of a traceback, its first lines; or the last line where there is none."""
    lines = said.strip().splitlines() or ["(nothing said)"]
    frames = [i for i, line in enumerate(lines) if line.startswith("    ")]
    first = frames[-1] + 1 if frames and frames[-1] + 1 < len(lines) else len(lines) - 1
    return "; ".join(lines[first : first + 2])


def streaming(scratch: Path, layers: int) -> dict[str, Metric]:
    """Memory that grows with a model, over its weights' bytes: ``streaming_over_chunk`` and ``streaming_over_weights``
    for float weights, ``streaming_int8_over_chunk`` and so on for weights that are quantised on the way."""
    for count in (1, layers):
        run("deep", str(scratch / f"deep{count}"), str(count))
    found: dict[str, Metric] = {}
    for side, key in (("streamed", "streaming"), ("int8", "streaming_int8")):
        peaks: dict[int, float] = {}
        for count in (1, layers):
            out = scratch / f"{side}{count}.bundle"
            peaks[count] = run(side, str(scratch / f"deep{count}"), str(out))["bytes"]
        sizes = [package.weight_bytes for package in read_manifest(out).packages]
        grown, device = peaks[layers] - peaks[1], device_name()
        packages = f"{len(sizes)} packages of at most {max(sizes) / 1e6:.1f} MB, {sum(sizes) / 1e6:.0f} MB in all"
        found[f"{key}_over_chunk"] = Metric(
            grown / max(sizes), "ratio", "measured", device, n=1, note=f"{layers} layers, {packages}"
        )
        found[f"{key}_over_weights"] = Metric(grown / sum(sizes), "ratio", "measured", device, n=1)
        found[f"{key}_bytes"] = Metric(peaks[layers], "bytes", "measured", device, n=1, note="imports included")
    return found


def peer_missing() -> str | None:
    """Why the torch route cannot run here."""
    lost = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(lost)}: pip install {' '.join(lost)}" if lost else None


def mlx2coreml(model: Path, out: Path, ours: float) -> Metric:
    """Our time over the other MLX route's, or why that one made nothing."""
    if importlib.util.find_spec("mlx2coreml") is None:
        return Metric(None, "ratio", "measured", device_name(), note="not installed: pip install --no-deps mlx2coreml")
    out.mkdir()
    try:
        theirs = run("mlx2coreml", str(model), str(out))["seconds"]
    except UserError as error:
        return Metric(None, "ratio", "measured", device_name(), note=error.what)
    return Metric(ours / theirs, "ratio", "measured", device_name(), n=1)


def measure(quick: bool) -> dict[str, Metric]:
    """``time_ratio``, ``memory_ratio`` (ours over peer), ``memory_over_weights`` (ours, peak over weight bytes), and
    `streaming`'s."""
    device, layers, rounds = device_name(), 4 if quick else 28, 1 if quick else 2
    missing = peer_missing()
    sides: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        run("random", str(model), str(layers))
        weights = (model / "model.safetensors").stat().st_size
        for i in range(rounds):
            for side in sides if missing is None else ["ours"]:
                out = Path(scratch) / f"{side}{i}"
                out.mkdir()
                sides[side].append(run(side, str(model), str(out)))
        ours = statistics.median(each["seconds"] for each in sides["ours"])
        other = mlx2coreml(model, Path(scratch) / "mlx2coreml", ours)
        streamed = streaming(Path(scratch), 32 if quick else 64)
    peer = f"transformers {versions()['transformers']}, coremltools {versions()['coremltools']}"
    note = missing or f"Qwen3-0.6B's shape, {layers} layers, {weights / 1e9:.2f} GB; peer {peer}"
    middle = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes")}
        for side, runs in sides.items()
        if runs
    }
    found = {}
    for key, name in (("seconds", "time_ratio"), ("bytes", "memory_ratio")):
        value = middle["ours"][key] / middle["torch"][key] if "torch" in middle else None
        found[name] = Metric(value, "ratio", "measured", device, n=rounds, note=note)
    over = middle["ours"]["bytes"] / weights
    found["memory_over_weights"] = Metric(over, "ratio", "measured", device, n=rounds, note="imports included")
    for side, values in middle.items():
        found[f"seconds_{side}"] = Metric(values["seconds"], "s", "measured", device, n=rounds)
        found[f"bytes_{side}"] = Metric(values["bytes"], "bytes", "measured", device, n=rounds)
    return found | streamed | {"mlx2coreml_time_ratio": other}
