"""Inputs of the losses that make calls early and short: ``early_call``, ``expected_length``, ``rollout_length``.

The losses themselves are members of ``mlxkd.losses.terms`` and see one position at a time; what they need to know
about the turn around it (is a call expected, how far has it come, how long may it still take) is worked out here,
per batch, on the host.
"""
