"""Judging models: how likely, how close to the teacher, how exact the tool calls, how fast."""
