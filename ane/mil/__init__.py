"""Read a saved ML program (.mlpackage) and run it on any machine."""
