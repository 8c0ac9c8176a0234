"""One module per loss; its file name is its name in a recipe.

A member defines

- ``NEEDS``: ``"teacher"`` (a distribution to match), ``"aligned"`` (a teacher with another tokenizer) or
  ``"labels"`` (token ids);
- ``Options``: a frozen dataclass, every field with a default, that refuses values out of range;
- ``loss(student, target, options, given)``: per-position values [n] and their gradient [n, V] with respect to
  the tempered student logits; ``target`` is a Distribution, an
  Aligned or int32 [n]; ``given`` holds the moving scalars and
  the per-position inputs by name;
- optionally ``live(options, progress)``: scalars that move during training, given the share of it done;
- optionally ``INPUTS``: names of per-position inputs without which it refuses to start, and
  ``further_inputs(options)``: those that some options need besides.
"""
