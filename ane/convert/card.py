"""The model card of a bundle: what it is, what it was made from, how to run it."""

from __future__ import annotations

from ane.convert.bundle import Manifest


def model_card(manifest: Manifest) -> str:
    """Markdown for the bundle's README.md."""
    model = manifest.model
    grids = ", ".join(f"{count} x {name}" for name, count in sorted(manifest.grids.items()))
    functions = ", ".join(f"`{f.name}` ({f.batch} x {f.query} tokens)" for f in manifest.functions)
    size = sum(p.weight_bytes for p in manifest.packages) / 1e6
    lines = [
        f"# Core ML bundle of {model.source}",
        "",
        f"- family: {model.family}, {model.layers} layers, width {model.hidden}, vocabulary {model.vocab}",
        f"- profile: {manifest.profile}, for {manifest.target} and later (specification "
        f"{manifest.specification_version})",
        f"- context: {manifest.context} tokens; keys and values: {manifest.kv}",
        f"- functions: {functions}",
        f"- weights: {grids}; {len(manifest.packages)} packages, {size:.1f} MB",
        f"- source SHA-256: {model.source_hash}",
    ]
    if manifest.expected_loss:
        worst = max(manifest.expected_loss, key=lambda path: manifest.expected_loss[path])
        lines.append(
            f"- quantised on export, not trained on this grid: relative error of the weights up to "
            f"{manifest.expected_loss[worst]:.3f} ({worst})"
        )
    lines += ["", "Run it with `mlxkd generate FOLDER PROMPT`; `manifest.json` describes every input and output."]
    return "\n".join(lines) + "\n"
