"""``<|tool_call>call:name{key:<|"|>text<|"|>,n:2}<tool_call|>`` (Gemma 4)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._gemma import Gemma

GRAMMAR = Gemma(open="<|tool_call>", close="<tool_call|>", quote='<|"|>')
