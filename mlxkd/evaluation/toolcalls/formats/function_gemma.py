"""``<start_function_call>call:name{key:<escape>text<escape>,n:2}<end_function_call>`` (FunctionGemma)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._gemma import Gemma

GRAMMAR = Gemma(open="<start_function_call>", close="<end_function_call>", quote="<escape>")
