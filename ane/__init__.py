"""Turn a packed student into a Core ML bundle for the Neural Engine, and run it."""
