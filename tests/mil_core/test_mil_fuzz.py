"""Damaged and hostile packages end in a clear error, soon, and without taking the machine's memory."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.mil import features, reader
from ane.mil.conformance import case
from ane.mil.inputs import random_inputs
from ane.mil.limits import Limits
from ane.mil.package import load
from mlxkd.errors import UserError

LIMITS = Limits(memory=32 << 20, seconds=0.5, loop_steps=10_000)
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
SECONDS = 1.0
# What all cases together may add to the process, far above what 32 MiB bounds need and far below one huge tensor.
GROWTH = 1 << 30
HUGE = (0, 1, 3, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**64 - 1)

Mutation = Callable[[random.Random, Path], None]


@pytest.fixture(scope="module")
def originals(ct: Any, mb: Any, types: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sound packages of different kinds: convolution, compressed weights with state, control flow."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec((1, 4, 8, 8))], opset_version=ct.target.iOS18)
    def network(x):  # type: ignore[no-untyped-def]
        y = mb.relu(x=mb.conv(x=x, weight=weight, pad_type="same"))
        y = mb.reshape(x=mb.max_pool(x=y, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"), shape=[1, 128])
        y = mb.linear(x=y, weight=rng.standard_normal((16, 128)).astype(np.float32))
        y = mb.concat(values=[y, mb.fill(shape=[1, 4], value=1.0), mb.tile(x=y, reps=[1, 2])], axis=1)
        return mb.softmax(x=mb.pad(x=y, pad=[0, 0, 1, 1]), axis=-1)

    state = mb.StateTensorSpec((2, 16, 8), types.fp16)

    @mb.program(
        input_specs=[mb.TensorSpec((1, 1, 8), types.fp16), mb.TensorSpec((1,), types.int32), state],
        opset_version=ct.target.iOS18,
    )
    def stateful(x, position, cache):  # type: ignore[no-untyped-def]
        begin = mb.concat(values=[[np.int32(0)], position, [np.int32(0)]], axis=0)
        end = mb.concat(values=[[np.int32(1)], mb.add(x=position, y=np.int32(1)), [np.int32(8)]], axis=0)
        new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=begin, end=end)
        full = mb.coreml_update_state(state=cache, value=new)
        codes = rng.integers(0, 16, (24, 8)).astype(types.np_uint4_dtype)
        lut = rng.standard_normal((1, 1, 16, 1)).astype(np.float16)
        palette = mb.constexpr_lut_to_dense(indices=codes, lut=lut)
        return mb.matmul(x=full, y=palette, transpose_y=True)

    @mb.program(input_specs=[mb.TensorSpec((3,)), mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def branching(x, y):  # type: ignore[no-untyped-def]
        counter, total = mb.while_loop(
            _cond=lambda i, t: mb.less(x=i, y=4.0),
            _body=lambda i, t: (mb.add(x=i, y=1.0), mb.add(x=t, y=x)),
            loop_vars=(mb.const(val=0.0), mb.mul(x=x, y=2.0)),
        )
        positive = mb.squeeze(x=mb.greater(x=y, y=0.0))
        chosen = mb.cond(pred=positive, _true_fn=lambda: mb.mul(x=total, y=2.0), _false_fn=lambda: mb.add(x=total, y=y))
        return mb.mul(x=chosen, y=counter)

    folder = tmp_path_factory.mktemp("originals")
    paths = []
    for name, program in (("network", network), ("stateful", stateful), ("branching", branching)):
        target = ct.target.iOS17 if name == "branching" else ct.target.iOS18
        precision = ct.precision.FLOAT16 if name == "stateful" else ct.precision.FLOAT32
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            compute_precision=precision,
            skip_model_load=True,
        )
        model.save(str(folder / f"{name}.mlpackage"))
        paths.append(folder / f"{name}.mlpackage")
    return paths


def execute(path: Path) -> None:
    """Load a package, describe it, and run every function."""
    package = load(path, limits=LIMITS)
    package.weight_bytes()
    for function in package.functions.values():
        state = function.make_state() if function.states else None
        function.predict(random_inputs(function.spec, limits=LIMITS), state)


def _file(rng: random.Random, package: Path) -> Path:
    files = [package / name for name in (MODEL, MODEL, WEIGHTS, "Manifest.json") if (package / name).exists()]
    return rng.choice(files)


def flip(rng: random.Random, package: Path) -> None:
    """Change a few bytes of one file."""
    path = _file(rng, package)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def truncate(rng: random.Random, package: Path) -> None:
    """Cut one file, or remove it."""
    path = _file(rng, package)
    if rng.random() < 0.05:
        path.unlink()
        return
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def splice(rng: random.Random, package: Path) -> None:
    """Copy one stretch of a file over or into another."""
    path = _file(rng, package)
    data = path.read_bytes()
    a, b = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[a : a + rng.randrange(1, 200)]
    path.write_bytes(data[:b] + piece + data[b + (len(piece) if rng.random() < 0.5 else 0) :])


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.message_type.GetOptions().map_entry:
            entries = value.values() if field.message_type.fields_by_name["value"].message_type else ()
        else:
            entries = value if field.is_repeated else [value]
        for entry in entries:
            yield from _messages(entry)


def _edit(package: Path, change: Callable[[list[Any]], None]) -> None:
    model = reader._parse(package / MODEL, LIMITS)
    change(list(_messages(model)))
    (package / MODEL).write_bytes(model.SerializeToString())


def remove_field(rng: random.Random, package: Path) -> None:
    """Remove a field somewhere in the specification."""

    def change(messages: list[Any]) -> None:
        filled = [m for m in messages if m.ListFields()]
        message = rng.choice(filled)
        message.ClearField(rng.choice(message.ListFields())[0].name)

    _edit(package, change)


def change_number(rng: random.Random, package: Path) -> None:
    """Put an extreme number where the specification has one: dimensions, ranks, offsets, constants, types."""

    def change(messages: list[Any]) -> None:
        spots = [(m, f) for m in messages for f, _ in m.ListFields() if f.cpp_type in (1, 2, 3, 4, 8)]
        message, field = rng.choice(spots)
        bits = {1: 31, 2: 63, 3: 32, 4: 64, 8: 6}[field.cpp_type]
        value = rng.choice(HUGE) % 2**bits * (-1 if field.cpp_type in (1, 2) and rng.random() < 0.3 else 1)
        if field.is_repeated:
            values = getattr(message, field.name)
            values[rng.randrange(len(values))] = value
        else:
            setattr(message, field.name, value)

    _edit(package, change)


def change_dimension(rng: random.Random, package: Path) -> None:
    """Make a dimension of a declared shape huge."""

    def change(messages: list[Any]) -> None:
        dimensions = [m for m in messages if m.DESCRIPTOR.name == "ConstantDimension"]
        if dimensions:
            rng.choice(dimensions).size = rng.choice(HUGE)

    _edit(package, change)


def swap_names(rng: random.Random, package: Path) -> None:
    """Exchange what two inputs are bound to, or what two operations are."""

    def change(messages: list[Any]) -> None:
        kind, field = rng.choice((("Binding", "name"), ("Operation", "type")))
        found = [m for m in messages if m.DESCRIPTOR.name == kind and getattr(m, field)]
        if len(found) > 1:
            a, b = rng.sample(found, 2)
            first, second = getattr(a, field), getattr(b, field)
            setattr(a, field, second)
            setattr(b, field, first)

    _edit(package, change)


MUTATIONS: tuple[Mutation, ...] = (
    flip, truncate, splice, remove_field, change_number, change_dimension, swap_names
)  # fmt: skip


def mutate_and_run(seed: int, originals: list[Path], folder: Path) -> str:
    """One case; returns "ran" or the error's text. Anything but a UserError propagates."""
    rng = random.Random(seed)
    target = folder / "case.mlpackage"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(rng.choice(originals), target)
    rng.choice(MUTATIONS)(rng, target)
    start = time.process_time()
    try:
        execute(target)
        outcome = "ran"
    except UserError as error:
        outcome = error.what
        assert outcome, "an error must say what is wrong"
    seconds = time.process_time() - start
    assert seconds < SECONDS, f"seed {seed} took {seconds:.1f} s: {outcome}"
    return outcome


@contextlib.contextmanager
def bounded_address_space(growth: int) -> Iterator[None]:
    """Make a request for more than ``growth`` bytes a MemoryError here, not the end of what else the machine runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + growth, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(seeds: range, originals: list[Path], folder: Path) -> None:
    for path in originals[:3]:
        execute(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bounded_address_space(4 * GROWTH):
        outcomes = [mutate_and_run(seed, originals, folder) for seed in seeds]
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH, f"the process grew by {growth >> 20} MiB"
    refused = [o for o in outcomes if o != "ran"]
    # A harness that mutates nothing, or a reader that refuses everything alike, would prove nothing.
    assert len(refused) > len(outcomes) // 3
    assert len(set(refused)) > len(refused) // 10


def test_a_few_hundred_damaged_packages_are_refused(originals: list[Path], tmp_path: Path) -> None:
    fuzz(range(400), originals, tmp_path)


@pytest.mark.slow
def test_ten_thousand_damaged_packages_are_refused(originals: list[Path], tmp_path: Path) -> None:
    fuzz(range(1_000, 11_000), originals, tmp_path)


@pytest.mark.slow
def test_damaged_models_of_coremltools_own_tests_are_refused(tmp_path: Path) -> None:
    """Every operation that the suite has, where it was harvested."""
    stored = [folder / case.MODEL for folder in case.stored(case.cache_folder() / "cases")]
    if not stored:
        pytest.skip("no case is stored (python -m ane.mil.conformance harvest)")
    fuzz(range(20_000, 30_000), stored, tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [(2**31 - 1, "input 'x' of shape .* would take 16.0 GiB"), (-2, r"input 'x' has the default shape \[-2, 2\]")],
)
def test_a_default_shape_that_the_program_leaves_open_is_bounded(
    size: int, message: str, ct: Any, mb: Any, tmp_path: Path
) -> None:
    """Found by mutating coremltools' own test models: 16 GiB of random numbers were asked for."""
    rows = ct.converters.mil.mil.get_new_symbol()

    @mb.program(input_specs=[mb.TensorSpec((rows, 2))], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        return mb.relu(x=x)

    target = ct.target.iOS17
    inputs = [ct.TensorType(name="x", shape=(ct.RangeDim(1, 8), 2))]
    model = ct.convert(
        program, inputs=inputs, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True
    )
    path = tmp_path / "open.mlpackage"
    model.save(str(path))
    execute(path)
    spec = reader._parse(path / MODEL, LIMITS)
    spec.description.input[0].type.multiArrayType.shape[0] = size
    (path / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(UserError, match=message):
        execute(path)


def test_every_feature_kind_is_known() -> None:
    assert set(features.CHANNELS) == set(features.COLORS.values())
