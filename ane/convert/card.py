"""The model card of a bundle: what it is, what it was made from, how to run it."""

from __future__ import annotations

from pathlib import Path

from ane.convert.bundle import Manifest


def size(manifest: Manifest) -> str:
    """How many packages, and the megabytes of their weights."""
    count = len(manifest.packages)
    megabytes = sum(package.weight_bytes for package in manifest.packages) / 1e6
    return f"{count} package{'s' if count > 1 else ''}, {megabytes:.1f} MB of weights"


def model_card(manifest: Manifest) -> str:
    """Markdown for the bundle's README.md."""
    model = manifest.model
    grids = ", ".join(f"{count} x {name}" for name, count in sorted(manifest.grids.items()))
    functions = ", ".join(f"`{f.name}` ({f.batch} x {f.query} tokens)" for f in manifest.functions)
    name = Path(model.source).name  # a folder's place on the machine that made it is nobody else's business
    lines = [
        f"# Core ML bundle of {name}",
        "",
        f"- family: {model.family}, {model.layers} layers, width {model.hidden}, vocabulary {model.vocab}",
        f"- profile: {manifest.profile}, for {manifest.target} and later (specification "
        f"{manifest.specification_version})",
        f"- context: {manifest.context} tokens; keys and values: {manifest.kv}",
        f"- functions: {functions}",
        f"- weights: {grids}; {size(manifest)}",
        f"- source SHA-256: {model.source_hash}",
    ]
    if manifest.expected_loss:
        worst = max(manifest.expected_loss, key=lambda path: manifest.expected_loss[path])
        lines.append(
            f"- quantised on export, not trained on this grid: relative error of the weights up to "
            f"{manifest.expected_loss[worst]:.3f} ({worst})"
        )
    run = "Run it with `mlxkd generate FOLDER PROMPT` (`--raw` where the model has no chat template)"
    lines += ["", f"{run}; `manifest.json` describes every input and output."]
    return "\n".join(lines) + "\n"
