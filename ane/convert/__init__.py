"""MLX weights to Core ML bundles for the Neural Engine or the GPU."""
