"""The embedded tool-calling world: a generator of conversations, its tokenizer and a small teacher."""

from pathlib import Path

DEMO_TEACHER = Path(__file__).with_name("assets") / "teacher"
