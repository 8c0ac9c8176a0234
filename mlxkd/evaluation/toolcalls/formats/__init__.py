"""Grammars of tool calls, one module per parser of mlx-lm, under the same name.

mlx-lm's parsers turn a finished call into a name and arguments. A grammar here says where a call stands in the
text: which characters are name, key, value and structure, and at which character the call is complete.
A module defines ``GRAMMAR``; shared scanners live in the modules that start with an underscore.
"""
