"""Measure MLX models, Core ML bundles and endpoints, and gate releases on the figures."""
