"""Distillation losses: pure tensor functions over one chunk, and the one place where chunks become a step."""
