"""coremltools' own operation tests as a conformance suite for ``ane.mil``.

The wheel of coremltools ships the tests it runs on a Mac: each builds a model, computes the expected outputs with
NumPy or torch, and hands both to ``compare_backend``, which does nothing off macOS. ``plugin`` puts ours in its
place: save the model, read it back, run it, compare.

    python -m ane.mil.conformance harvest --seconds 1200   # store cases (package, inputs, expected) in a cache
    python -m ane.mil.conformance replay                   # run everything stored, write docs/mil-conformance.md
    python -m ane.mil.conformance sample                   # choose the tests that every CI run repeats

The tests stay where coremltools installed them; nothing of theirs is copied into this repository.
"""
